"""Mamba-3: the paper's recurrence token by token, with the published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import Mamba3Config, build_mixer
from tests.support.layer_parity import HIDDEN, context
from tests.support.mixer_cases import build, inputs, run


@pytest.mark.parametrize("name", ["mamba3", "mamba3_norm", "mamba3_mimo", "mamba3_mimo_norm"])
def test_the_block_is_the_recurrence_of_the_paper(name):
    """Trapezoidal writes of two tokens, complex keys and queries, angles summed up; with strong and weak decays."""
    mixer, x = build(name), inputs(1, 9)[0]
    config = mixer.config
    H, P, N, A = config.num_heads, config.head_dim, config.state_size, config.pairs
    R, per_group = config.rank, H // config.num_groups
    ones = torch.ones(H, R, P, dtype=x.dtype)
    mimo_x, mimo_z, mimo_o = (ones if scale is None else scale.copy_(torch.randn_like(scale)) for scale in (
        y if y is None else y.data for y in (mixer.mimo_x, mixer.mimo_z, mixer.mimo_o)))
    with torch.no_grad():
        mixer.dt_bias[0] += 4.0
        z, u, B, C, dt, rate, trap, theta = mixer.in_proj(x).split(config.widths, -1)
        dt, rate, trap = F.softplus(dt + mixer.dt_bias), -F.softplus(rate).clamp_min(1e-4), trap.sigmoid()
        B, C = (y.view(9, R, config.num_groups, N) for y in (B, C))
        y = torch.zeros(9, H, P, dtype=x.dtype)
        for h in range(H):
            S, last, angle = torch.zeros(N, P, dtype=x.dtype), torch.zeros(N, P, dtype=x.dtype), torch.zeros(A)
            head = slice(h * P, h * P + P)
            for t in range(9):
                angle = angle + torch.pi * theta[t].tanh() * dt[t, h]
                turn = torch.polar(torch.ones_like(angle), angle)
                rows = []
                for source, norm, bias in ((B, mixer.B_norm, mixer.B_bias), (C, mixer.C_norm, mixer.C_bias)):
                    row = source[t, :, h // per_group]
                    row = row / (row.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + bias[h]
                    turned = torch.view_as_complex(row[:, : 2 * A].reshape(R, A, 2)) * turn
                    rows.append(torch.cat([torch.view_as_real(turned).flatten(1), row[:, 2 * A :]], 1))
                k, q = rows
                v = u[t, head] * mimo_x[h]
                decay = (dt[t, h] * rate[t, h]).exp()
                S = decay * S + (1 - trap[t, h]) * dt[t, h] * decay * last + trap[t, h] * dt[t, h] * k.T @ v
                last = k.T @ v
                o = q @ S + mixer.D[h] * v
                if mixer.norm is not None:
                    weight = mixer.norm.weight.view(H, P)[h]
                    o = o / (o.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * weight
                y[t, h] = (o * F.silu(z[t, head] * mimo_z[h]) * mimo_o[h]).sum(0)
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.out_proj(y.flatten(1)))


def test_ranks_start_with_even_shares():
    mixer = build_mixer(Mamba3Config(num_heads=2, head_dim=3, state_size=4, rank=4), context())
    mixer.init_weights(0.02)
    for parameter, value in ((mixer.mimo_x, 0.25), (mixer.mimo_z, 1.0), (mixer.mimo_o, 0.25), (mixer.B_bias, 1.0)):
        assert torch.equal(parameter, torch.full_like(parameter, value))


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
    ({"rank": 0}, "rank: must be positive"),
    ({"num_groups": 3}, "num_groups: must divide num_heads"),
    ({"state_size": 4, "rope_fraction": 0.25}, "rope_fraction: must turn a pair"),
    ({"rope_fraction": 1.5}, "rope_fraction: must turn a pair"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Mamba3Config(num_heads=4, head_dim=8, **options)
