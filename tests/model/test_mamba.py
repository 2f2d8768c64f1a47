"""Mamba and Longhorn: equal to the layers of transformers, to the paper's formulas, and with the published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import MambaConfig, build_mixer
from hybridlm.model.sequence import SequenceInfo
from tests.support.layer_parity import HIDDEN, TOLERANCE, context, ours, random_weights, renamed, token_inputs
from tests.support.mixer_cases import build, inputs, run

NAMES = {"conv1d.": "conv.", "dt_proj.bias": "dt_bias", "dt_layernorm": "dt_norm", "b_layernorm": "B_norm",
         "c_layernorm": "C_norm"}


def compare(layer: torch.nn.Module, config: MambaConfig, eps: float = 1e-5) -> None:
    random_weights(layer)
    layer.A_log.data = 0.3 * torch.randn(layer.A_log.shape, generator=torch.Generator().manual_seed(5))
    weights = renamed(layer, NAMES)
    weights["conv.weight"] = weights["conv.weight"][:, 0]
    x = token_inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(config, weights, x, eps=eps), layer.eval().forward(x), **TOLERANCE)


def test_equals_the_mamba_layer_of_transformers():
    from transformers import MambaConfig as TheirConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    compare(MambaMixer(TheirConfig(hidden_size=HIDDEN, state_size=8, time_step_rank=4), 0),
            MambaConfig(state_size=8, dt_rank=4))


def test_equals_the_falcon_mamba_layer_of_transformers():
    from transformers import FalconMambaConfig
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer

    theirs = FalconMambaConfig(hidden_size=HIDDEN, state_size=8, time_step_rank=4, use_bias=True)
    # Its own start asks its norms for weights that they do not have.
    compare(FalconMambaMixer(theirs, 0, initialize_mixer_weights=False),
            MambaConfig(state_size=8, dt_rank=4, inner_norm="plain", norm_eps=1e-6, bias=True))


def test_equals_the_mamba_layer_of_jamba():
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    compare(JambaMambaMixer(JambaConfig(hidden_size=HIDDEN, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
                            0), MambaConfig(state_size=8, dt_rank=4, inner_norm="learned", norm_eps=1e-6))


def test_longhorn_takes_the_step_of_its_online_regression():
    """Each token moves the state by beta / (1 + beta |B|^2), on the factor's diagonal (Liu et al. 2024, eq. 9)."""
    mixer, x = build("longhorn"), inputs(1, 6)
    with torch.no_grad():
        u, z = mixer.in_proj(x[0]).chunk(2, -1)
        padded = F.pad(u, (0, 0, 3, 0))
        u = F.silu(mixer.conv.bias + sum(padded[w : w + 6] * mixer.conv.weight[:, w] for w in range(4)))
        d, k, q = mixer.x_proj(u).split(mixer.sizes, -1)
        beta = (mixer.dt_proj(d) + mixer.dt_bias).sigmoid()
        h, outputs = torch.zeros(u.shape[1], 4, dtype=x.dtype), []
        for t in range(6):
            step = (beta[t] / (1 + beta[t] * (k[t] @ k[t])))[:, None]
            h = h - step * h * k[t] ** 2 + step * u[t][:, None] * k[t]
            outputs.append(h @ q[t] + mixer.D * u[t])
        expected = mixer.out_proj(torch.stack(outputs) * F.silu(z))
        torch.testing.assert_close(run(mixer, x)[0], expected)


def test_the_start_is_the_published_one():
    torch.manual_seed(0)
    mixer = build_mixer(MambaConfig(), context())
    mixer.init_weights(0.02)
    assert torch.equal(mixer.A_log[5].exp().round(), torch.arange(1.0, 17.0))
    assert torch.equal(mixer.D, torch.ones(2 * HIDDEN))
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert steps.log().mean().item() == pytest.approx(0.5 * (torch.log(torch.tensor(1e-3 * 0.1))).item(), abs=0.35)
    assert mixer.dt_proj.weight.abs().max() <= 4**-0.5
    assert mixer.dt_proj.weight.std().item() == pytest.approx(4**-0.5 / 3**0.5, rel=0.1)


def test_states_are_lost_at_borders_and_kept_over_long_rows():
    mixer, x = build("mamba", dtype=torch.float32), inputs(1, 300, dtype=torch.float32)
    mixer.dt_bias.data -= 6.0  # steps so small that the first token still counts after 300
    changed = x.clone()
    changed[:, 0] += 1.0
    seq = SequenceInfo.make(1, 300, x.device)
    assert (mixer(x, seq)[0] - mixer(changed, seq)[0])[0, -1].abs().max() > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"state_size": 0}, "state_size: must be positive"),
    ({"conv_size": 1}, "conv_size: is not a convolution"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MambaConfig(**options)
