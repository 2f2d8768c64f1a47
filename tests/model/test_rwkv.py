"""Time and channel mixes of RWKV: the papers' recurrences token by token, and their start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.model.feed_forward import RWKVChannelMixConfig, build_feed_forward
from hybridlm.model.mixers import RWKV6Config, build_mixer
from hybridlm.model.sequence import SequenceInfo
from tests.support.layer_parity import HIDDEN, context
from tests.support.mixer_cases import build, context_of, inputs, run


@pytest.mark.parametrize("version", [5, 6])
def test_the_time_mix_is_the_recurrence_of_the_paper(version):
    mixer, x = build(f"rwkv{version}"), inputs(1, 7)
    # Strong decays, so that reading before or after the decay makes a difference.
    mixer.decay.data = torch.linspace(-1.0, 1.0, 16, dtype=x.dtype).view(2, 8)
    with torch.no_grad():
        outputs, before = [], torch.zeros_like(x[0, 0])
        S = torch.zeros(2, 8, 8, dtype=x.dtype)
        for token in x[0]:
            delta = before - token
            if version == 5:
                r, k, v, g = (token + delta * mix for mix in mixer.mix)
                w = torch.exp(-torch.exp(mixer.decay))
            else:
                base = token + delta * mixer.mix_base
                w_in, k, v, r, g = (token + delta * (mixer.mix[i] + torch.tanh(base @ mixer.mix_a[i]) @ mixer.mix_b[i])
                                    for i in range(5))
                low = mixer.decay_b_proj(torch.tanh(mixer.decay_a_proj(w_in))).view(2, 8)
                w = torch.exp(-torch.exp(mixer.decay + low))
            r, k, v = mixer.r_proj(r).view(2, 8), mixer.k_proj(k).view(2, 8), mixer.v_proj(v).view(2, 8)
            written = k[:, :, None] * v[:, None, :]
            y = torch.einsum("hk,hkv->hv", r, S + mixer.bonus[:, :, None] * written)
            S = w[:, :, None] * S + written
            y = F.group_norm(y.view(1, 16), 2, mixer.o_norm.weight, mixer.o_norm.bias, 64e-5)[0]
            outputs.append(mixer.o_proj(y * F.silu(mixer.g_proj(g))))
            before = token
        torch.testing.assert_close(run(mixer, x)[0], torch.stack(outputs))


def test_the_start_of_finch_is_the_published_one():
    """Ramps of the authors' code for layer 1 of 4 and 64 channels, written out for single channels."""
    torch.manual_seed(0)
    mixer = build_mixer(RWKV6Config(num_heads=4, head_dim=16), context(layer_index=1, num_layers=4))
    mixer.init_weights(0.02)
    r01, r10 = 1 / 3, 3 / 4
    decay, bonus = mixer.decay.flatten(), mixer.bonus.flatten()
    for n in (0, 1, 31, 63):
        assert decay[n].item() == pytest.approx(-6 + 5 * (n / 63) ** (0.7 + 1.3 * r01), abs=1e-5)
        assert bonus[n].item() == pytest.approx(r01 * (1 - n / 63) + ((n + 1) % 3 - 1) * 0.1, abs=1e-6)
        w, k, v, r, g = mixer.mix[:, n].tolist()
        assert w == k == pytest.approx(1 - (n / 64) ** r10, abs=1e-6)
        assert v == pytest.approx(1 - ((n / 64) ** r10 + 0.3 * r01), abs=1e-6)
        assert r == g == pytest.approx(1 - (n / 64) ** (0.5 * r10), abs=1e-6)
    assert not mixer.mix_a.any()
    assert not mixer.decay_a_proj.weight.any()
    assert mixer.mix_b.abs().max() <= 0.01
    assert mixer.mix_b.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("receptance", [False, True])
def test_the_channel_mix_is_the_formula_of_the_paper(receptance):
    torch.manual_seed(0)
    config = RWKVChannelMixConfig(intermediate_size=20, receptance=receptance)
    module = build_feed_forward(config, context_of()).double()
    module.init_weights(0.3)
    x = inputs(1, 5)
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    with torch.no_grad():
        k = module.key_proj(x * (1 - module.mix_k) + before * module.mix_k)
        expected = module.value_proj(torch.clamp(k, min=0) ** 2)
        if receptance:
            expected *= torch.sigmoid(module.r_proj(x * (1 - module.mix_r) + before * module.mix_r))
        torch.testing.assert_close(module(x, SequenceInfo.make(1, 5, x.device))[0], expected)


def test_the_channel_mix_of_the_first_layers_looks_back_more():
    starts = {}
    for layer in (0, 3):
        for receptance in (False, True):
            config = RWKVChannelMixConfig(intermediate_size=16, receptance=receptance)
            module = build_feed_forward(config, context(layer_index=layer, num_layers=4))
            module.init_weights(0.02)
            starts[layer, receptance] = module.mix_k[HIDDEN // 2].item()
    assert starts[0, True] == starts[0, False] == pytest.approx(0.5)
    assert starts[3, True] == pytest.approx(1 - 0.5**0.25)
    assert starts[3, False] == pytest.approx(1 - 0.5 ** (0.25**4), abs=1e-6)
