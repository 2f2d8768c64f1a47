"""Mamba-2: equal to the layers of transformers, to the paper's recurrence, and with its published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import Mamba2Config, build_mixer
from tests.support.layer_parity import HIDDEN, TOLERANCE, context, ours, random_weights, renamed, token_inputs
from tests.support.mixer_cases import build, inputs, run

SIZES = {"num_heads": 8, "head_dim": 16, "state_size": 8, "num_groups": 2}


def compare(layer: torch.nn.Module, config: Mamba2Config) -> None:
    random_weights(layer)
    weights = renamed(layer, {"conv1d.": "conv."}, drop=("mup_vector",))
    weights["conv.weight"] = weights["conv.weight"][:, 0]
    x = token_inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(config, weights, x, eps=1e-5), layer.eval().forward(x), **TOLERANCE)


def test_equals_the_mamba2_layer_of_transformers():
    from transformers import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    theirs = TheirConfig(hidden_size=HIDDEN, num_heads=8, head_dim=16, state_size=8, n_groups=2, chunk_size=16,
                         time_step_limit=(0.3, 1.2))
    compare(Mamba2Mixer(theirs, 0), Mamba2Config(**SIZES, dt_min=0.3, dt_max=1.2))


def test_equals_the_mamba2_layer_of_bamba_with_biases_and_without_one():
    from transformers import BambaConfig
    from transformers.models.bamba.modeling_bamba import BambaMixer

    theirs = BambaConfig(hidden_size=HIDDEN, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=2,
                         mamba_chunk_size=16, mamba_conv_bias=False, mamba_proj_bias=True, num_hidden_layers=1)
    compare(BambaMixer(theirs, 0), Mamba2Config(**SIZES, conv_bias=False, bias=True))


def test_equals_the_mamba2_layer_of_zamba2():
    from transformers import Zamba2Config
    from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

    theirs = Zamba2Config(hidden_size=HIDDEN, n_mamba_heads=8, mamba_headdim=16, mamba_d_state=8, mamba_ngroups=2,
                          chunk_size=16, time_step_min=0.5)
    compare(Zamba2MambaMixer(theirs, 0), Mamba2Config(**SIZES, dt_min=0.5))


def test_equals_the_mamba2_layer_of_nemotron_h():
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    theirs = NemotronHConfig(hidden_size=HIDDEN, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=8, n_groups=2,
                             chunk_size=16, time_step_min=0.5)
    compare(NemotronHMamba2Mixer(theirs, 0), Mamba2Config(**SIZES, dt_min=0.5))


def test_equals_the_mamba2_layer_of_falcon_h1_which_has_no_norm():
    from transformers import FalconH1Config
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

    theirs = FalconH1Config(hidden_size=HIDDEN, mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=8,
                            mamba_n_groups=2, mamba_chunk_size=16, mamba_rms_norm=False, num_hidden_layers=1)
    layer = FalconH1Mixer(theirs, 0)
    layer.register_buffer("mup_vector", torch.ones(1))  # its model sets it from the multipliers, all 1 here
    compare(layer, Mamba2Config(**SIZES, norm="none"))


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1_mamba2"])
def test_the_block_is_the_recurrence_of_the_paper(name):
    """Token by token in the symbols of Dao and Gu 2024, with strong decay among the steps."""
    mixer, x = build(name), inputs(1, 7)
    config = mixer.config
    H, P, G, N, inner = config.num_heads, config.head_dim, config.num_groups, config.state_size, config.inner_size
    with torch.no_grad():
        mixer.dt_bias[0] += 4.0
        scales = torch.tensor(config.input_scales or [1.0] * 5, dtype=x.dtype)
        scales = scales.repeat_interleave(torch.tensor([inner, inner, G * N, G * N, H]))  # of z, x, B, C and dt
        z, u, dt = (mixer.in_proj(x[0]) * scales).split((inner, inner + 2 * G * N, H), -1)
        padded = F.pad(u, (0, 0, 3, 0))
        u = F.silu(mixer.conv.bias + sum(padded[w : w + 7] * mixer.conv.weight[:, w] for w in range(4)))
        dt = F.softplus(dt + mixer.dt_bias).clamp(config.dt_min, config.dt_max or torch.inf)
        y = torch.zeros(7, H, P, dtype=x.dtype)
        for h in range(H):
            S = torch.zeros(N, P, dtype=x.dtype)
            group = slice(inner + h // (H // G) * N, inner + h // (H // G) * N + N)
            for t in range(7):
                x_t, B_t = u[t, h * P : (h + 1) * P], u[t, group]
                C_t = u[t, group.start + G * N : group.stop + G * N]
                S = (-dt[t, h] * mixer.A_log[h].exp()).exp() * S + dt[t, h] * torch.outer(B_t, x_t)
                y[t, h] = C_t @ S + mixer.D[h] * x_t
        y = y.flatten(1) * F.silu(z)
        if mixer.norm is not None:
            groups = y.view(7, G, -1)
            normed = groups / (groups.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt()
            y = normed.flatten(1) * mixer.norm.weight
        torch.testing.assert_close(run(mixer, x)[0], mixer.out_proj(y))


def test_the_start_is_the_published_one():
    torch.manual_seed(0)
    mixer = build_mixer(Mamba2Config(num_heads=200, head_dim=2, state_size=4), context())
    mixer.init_weights(0.02)
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert rates.min() >= 1.0
    assert rates.max() <= 16.0
    assert rates.mean().item() == pytest.approx(8.5, abs=1.0)
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert steps.log().mean().item() == pytest.approx(0.5 * torch.tensor(1e-4).log().item(), abs=0.35)
    assert torch.equal(mixer.D, torch.ones(200))
    assert torch.equal(mixer.norm.weight, torch.ones(400))
    assert mixer.conv.weight.abs().max() <= 0.5
    assert mixer.conv.weight.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)


@pytest.mark.parametrize(("options", "message"), [
    ({"state_size": 0}, "state_size: must be positive"),
    ({"conv_size": 1}, "conv_size: is not a convolution"),
    ({"num_groups": 3}, "num_groups: must divide num_heads"),
    ({"dt_min": 0.5, "dt_max": 0.2}, "dt_max: must be above dt_min"),
    ({"a_init": (0.0, 1.0)}, "a_init: must be a positive range"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Mamba2Config(num_heads=4, head_dim=8, **options)
