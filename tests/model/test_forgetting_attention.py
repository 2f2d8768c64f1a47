"""Attention with a forget gate: the formulas of the paper token by token, the published start, bad options."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import AttentionConfig, ForgettingAttentionConfig, build_mixer
from hybridlm.model.rope import RopeConfig
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, context_of, inputs, run

EPS = 1e-5


def rms(x, weight):
    return x / (x.square().mean() + EPS).sqrt() * weight


def test_the_pro_block_is_that_of_the_paper():
    mixer, x = build("fox_pro"), inputs(1, 9)[0]
    H, K = 4, 8
    with torch.no_grad():
        outputs = run(mixer, x[None])[0]
        keys, values, forgets = [], [], []
        for t in range(9):
            shifted = {}
            for name in "kv":
                projected, gate = getattr(mixer, f"{name}_proj").weight, getattr(mixer, f"{name}_shift_proj").weight
                alpha = (gate @ x[t]).sigmoid().repeat_interleave(K)
                before = projected @ x[t - 1] if t else torch.zeros(H * K, dtype=x.dtype)
                shifted[name] = (alpha * before + (1 - alpha) * (projected @ x[t])).view(H, K)
            weight_q, weight_k, weight_o = (norm.weight.view(H, K) for norm in (mixer.q_norm, mixer.k_norm,
                                                                                 mixer.o_norm))
            keys.append(torch.stack([rms(shifted["k"][h], weight_k[h]) for h in range(H)]))
            values.append(shifted["v"])
            forgets.append((mixer.f_proj.weight @ x[t] + mixer.f_proj.bias).sigmoid())
            query = (mixer.q_proj.weight @ x[t]).view(H, K)
            heads = []
            for h in range(H):
                q = rms(query[h], weight_q[h])
                scores = torch.stack([(q @ keys[s][h] / K**0.5).exp()
                                      * torch.stack([f[h] for f in forgets[s + 1 :]] or [x.new_ones(())]).prod()
                                      for s in range(t + 1)])
                o = sum(p * values[s][h] for s, p in enumerate(scores / scores.sum()))
                heads.append(rms(o, weight_o[h]))
            gated = torch.cat(heads) * (mixer.g_proj.weight @ x[t]).sigmoid()
            torch.testing.assert_close(outputs[t], mixer.o_proj.weight @ gated)


def test_open_gates_leave_plain_attention():
    torch.manual_seed(0)
    mixer = build_mixer(ForgettingAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig()),
                        context_of())
    plain = build_mixer(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), context_of())
    mixer.init_weights(0.2)
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if not name.startswith("f_proj")})
    with torch.no_grad():
        mixer.f_proj.weight.zero_()
        mixer.f_proj.bias.fill_(40.0)
    x = inputs(2, 30, torch.float32)
    torch.testing.assert_close(run(mixer, x), run(plain, x), rtol=1e-5, atol=1e-6)


def test_gates_start_around_one_half():
    """Normal weights and no bias: the published initialisation of the data-dependent gate."""
    torch.manual_seed(0)
    mixer = build_mixer(ForgettingAttentionConfig(num_heads=8, head_dim=8, kv_shift=True), context())
    mixer.init_weights(0.02)
    assert torch.equal(mixer.f_proj.bias, torch.zeros(8))
    for projection in (mixer.f_proj, mixer.k_shift_proj, mixer.v_shift_proj):
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_kv_heads": 3}, "num_kv_heads: must divide num_heads; got 3"),
    ({"window": 0}, "window: must be positive; got 0"),
    ({"qk_norm_eps": 0.0}, "qk_norm_eps: must be positive; got 0"),
    ({"rope": RopeConfig(partial_rotary_factor=0.2)}, "rope: must rotate an even number of dims"),
])
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        ForgettingAttentionConfig(num_heads=4, head_dim=8, **options)
