"""Mamba-3: the paper's recurrence token by token, with the published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import Mamba3Config, build_mixer
from tests.support.layer_parity import HIDDEN, context
from tests.support.mixer_cases import build, inputs, run


@pytest.mark.parametrize("name", ["mamba3", "mamba3_norm"])
def test_the_block_is_the_recurrence_of_the_paper(name):
    """Trapezoidal writes of two tokens, complex keys and queries, angles summed up; with strong and weak decays."""
    mixer, x = build(name), inputs(1, 9)[0]
    config = mixer.config
    H, P, N, G, R = config.num_heads, config.head_dim, config.state_size, config.num_groups, config.pairs
    with torch.no_grad():
        mixer.dt_bias[0] += 4.0
        z, u, B, C, dt, A, trap, theta = mixer.in_proj(x).split(config.widths, -1)
        dt, A, trap = F.softplus(dt + mixer.dt_bias), -F.softplus(A).clamp_min(1e-4), trap.sigmoid()
        y = torch.zeros(9, H, P, dtype=x.dtype)
        for h in range(H):
            S, last, angle = torch.zeros(N, P, dtype=x.dtype), torch.zeros(N, P, dtype=x.dtype), torch.zeros(R)
            for t in range(9):
                angle = angle + torch.pi * theta[t].tanh() * dt[t, h]
                group = slice(h // (H // G) * N, h // (H // G) * N + N)
                rows = []
                for source, norm, bias in ((B, mixer.B_norm, mixer.B_bias), (C, mixer.C_norm, mixer.C_bias)):
                    row = source[t, group]
                    row = row / (row.square().mean() + norm.eps).sqrt() * norm.weight + bias[h]
                    turned = torch.view_as_complex(row[: 2 * R].view(R, 2)) * torch.polar(torch.ones_like(angle), angle)
                    rows.append(torch.cat([torch.view_as_real(turned).flatten(), row[2 * R :]]))
                new = torch.outer(rows[0], u[t, h * P : (h + 1) * P])
                decay = (dt[t, h] * A[t, h]).exp()
                S = decay * S + (1 - trap[t, h]) * dt[t, h] * decay * last + trap[t, h] * dt[t, h] * new
                last = new
                y[t, h] = rows[1] @ S + mixer.D[h] * u[t, h * P : (h + 1) * P]
        if mixer.norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * mixer.norm.weight.view(H, P)
        expected = mixer.out_proj(y.flatten(1) * F.silu(z))
        torch.testing.assert_close(run(mixer, x[None])[0], expected)


def test_the_start_is_the_published_one():
    torch.manual_seed(0)
    mixer = build_mixer(Mamba3Config(num_heads=200, head_dim=2, state_size=4), context())
    mixer.init_weights(0.02)
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert steps.log().mean().item() == pytest.approx(0.5 * torch.tensor(1e-4).log().item(), abs=0.35)
    for parameter in (mixer.B_bias, mixer.C_bias, mixer.D, mixer.B_norm.weight, mixer.C_norm.weight):
        assert torch.equal(parameter, torch.ones_like(parameter))
    assert mixer.in_proj.weight.shape == (2 * 400 + 2 * 4 + 3 * 200 + 1, HIDDEN)


@pytest.mark.parametrize(("options", "message"), [
    ({"state_size": 0}, "state_size: must be positive"),
    ({"num_groups": 3}, "num_groups: must divide num_heads"),
    ({"state_size": 4, "rope_fraction": 0.25}, "rope_fraction: must turn a pair"),
    ({"rope_fraction": 1.5}, "rope_fraction: must turn a pair"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Mamba3Config(num_heads=4, head_dim=8, **options)
