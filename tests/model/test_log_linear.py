"""Log-linear attention in its two blocks: the paper's formulas token by token, and the published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import DeltaRuleConfig, Mamba2Config, build_mixer
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, inputs, run

T = 21


def level(t, s, levels):
    """0 for the token itself; else one more than the highest bit in which the positions differ, at most the last."""
    return next((bit + 1 for bit in range(levels - 2, -1, -1) if t >> bit != s >> bit), 0)


def causal_conv(weight, x, bias=0.0):
    taps = weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return F.silu(bias + sum(padded[w : w + T] * weight[:, w] for w in range(taps)))


def read(q, k, v, decay, scales, beta=None):
    """One head, by the product of all transitions between two tokens, [K, K] each."""
    eye, o = torch.eye(k.shape[1], dtype=k.dtype), torch.zeros_like(v)
    step = [decay[t] * (eye if beta is None else eye - beta[t] * torch.outer(k[t], k[t])) for t in range(T)]
    for t in range(T):
        between = eye
        for s in range(t, -1, -1):
            weight = q[t] @ between @ k[s] * (1.0 if beta is None else beta[s])
            o[t] += scales[t, level(t, s, scales.shape[1])] * weight * v[s]
            between = between @ step[s]
    return o


def test_gated_deltanet_reads_each_block_with_its_scale():
    mixer, x = build("log_linear_gdn"), inputs(1, T)[0]
    H, HV, K, L = 2, 4, 6, 5
    with torch.no_grad():
        q, k, v = (causal_conv(getattr(mixer, f"{n}_conv"), getattr(mixer, f"{n}_proj")(x)) for n in "qkv")
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q.view(T, H, K), k.view(T, H, K)))
        v, beta = v.view(T, HV, K), torch.sigmoid(mixer.b_proj(x))
        decay = torch.exp(-mixer.A_log.exp() * torch.log1p((mixer.a_proj(x) + mixer.dt_bias).exp()))
        scales = torch.log1p((mixer.level_scale * mixer.l_proj(x)).exp()).view(T, HV, L)
        o = torch.stack([read(q[:, h // 2], k[:, h // 2], v[:, h], decay[:, h], scales[:, h], beta[:, h])
                         for h in range(HV)], 1)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
        o = o.flatten(1) * F.silu(mixer.g_proj(x))
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(o), rtol=1e-7, atol=1e-9)


def test_mamba2_reads_each_block_with_its_scale():
    mixer, x = build("log_linear_mamba2"), inputs(1, T)[0]
    H, P, N, G, L = 4, 6, 8, 2, 8
    with torch.no_grad():
        z, xBC, dt, u = mixer.in_proj(x).split([H * P, H * P + 2 * G * N, H, H * L], -1)
        v, B, C = causal_conv(mixer.conv.weight, xBC, mixer.conv.bias).split([H * P, G * N, G * N], -1)
        v, B, C = v.view(T, H, P), B.view(T, G, N), C.view(T, G, N)
        dt = torch.log1p((dt + mixer.dt_bias).exp())
        decay = torch.exp(-dt * mixer.A_log.exp())
        scales = torch.log1p((mixer.level_scale * u).exp()).view(T, H, L)
        y = torch.stack([read(C[:, h // 2], B[:, h // 2], dt[:, h, None] * v[:, h], decay[:, h], scales[:, h])
                         for h in range(H)], 1)
        y = (y + mixer.D[:, None] * v).flatten(1) * F.silu(z)
        grouped = y.view(T, G, -1)
        y = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * mixer.norm.weight
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.out_proj(y), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("config", [DeltaRuleConfig(num_heads=2, head_dim=8, decay="scalar", levels=15),
                                    Mamba2Config(num_heads=2, head_dim=8, levels=15)])
def test_all_levels_start_alike(config):
    mixer = build_mixer(config, context())
    mixer.init_weights(0.02)
    assert torch.equal(mixer.level_scale, torch.ones(2 * 15))


@pytest.mark.parametrize(("options", "message"), [
    ({"levels": 1}, "levels: must be null or at least 2"),
    ({"levels": 4, "steps": 2}, "levels: are defined for one plain write per token"),
    ({"levels": 4, "implicit": True}, "levels: are defined for one plain write per token"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DeltaRuleConfig(num_heads=2, head_dim=8, **options)


def test_divided_rows_are_refused():
    for name in ("log_linear_gdn", "log_linear_mamba2"):
        with pytest.raises(ConfigError, match="levels: cannot work on split rows"):
            build(name).config.check_context_parallel(2, 64)
