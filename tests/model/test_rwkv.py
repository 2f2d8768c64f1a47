"""Time and channel mixes of RWKV: the papers' recurrences token by token, and their start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import hybridlm
from hybridlm.errors import ConfigError
from hybridlm.model.feed_forward import RWKVChannelMixConfig, build_feed_forward
from hybridlm.model.mixers import RWKV6Config, RWKV7Config, build_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm.run_config import load_config
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


def goose_pair():
    """Two layers of RWKV-7 in fp64, the second of which reads the values of the first."""
    config = RWKV7Config(num_heads=2, head_dim=8, decay_rank=5, rate_rank=4, gate_rank=6, value_rank=3)
    torch.manual_seed(0)
    layers = [build_mixer(config, context_of(layer_index=i, layers=[config, config])) for i in range(2)]
    for layer in layers:
        layer.init_weights(0.3)
        for parameter in layer.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return torch.nn.ModuleList(layers).double()


def goose(mixer, x, v_first=None):
    """The time mix of RWKV-7 as the authors write it, with states [V, K]: outputs of one row and its values."""
    outputs, values, before = [], [], torch.zeros_like(x[0])
    S = torch.zeros(2, 8, 8, dtype=x.dtype)
    for t, token in enumerate(x):
        xr, xw, xk, xv, xa, xg = (token + (before - token) * mix for mix in mixer.mix)
        r, k, v = mixer.r_proj(xr), mixer.k_proj(xk), mixer.v_proj(xv)
        z = mixer.decay + mixer.decay_b_proj(torch.tanh(mixer.decay_a_proj(xw)))
        w = torch.exp(-torch.exp(-F.softplus(-z) - 0.5)).view(2, 8)
        values.append(v)
        if v_first is not None:
            v = v + (v_first[t] - v) * torch.sigmoid(mixer.value_share + mixer.value_b_proj(mixer.value_a_proj(xv)))
        a = torch.sigmoid(mixer.rate + mixer.rate_b_proj(mixer.rate_a_proj(xa)))
        g = mixer.gate_b_proj(torch.sigmoid(mixer.gate_a_proj(xg)))
        kk = F.normalize((k * mixer.key_scale).view(2, 8), dim=-1, p=2.0)
        k = k * (1 + (a - 1) * mixer.key_rate)
        r, k, v, a = (y.view(2, 8) for y in (r, k, v, a))
        removed = torch.einsum("hvk,hk->hv", S, -kk)
        S = S * w[:, None] + removed[:, :, None] * (kk * a)[:, None] + v[:, :, None] * k[:, None]
        y = torch.einsum("hvk,hk->hv", S, r).reshape(1, 16)
        y = F.group_norm(y, 2, mixer.o_norm.weight, mixer.o_norm.bias, 64e-5)[0]
        y = y + ((r * k * mixer.bonus).sum(-1, keepdim=True) * v).view(16)
        outputs.append(mixer.o_proj(y * g))
        before = token
    return torch.stack(outputs), torch.stack(values)


@pytest.mark.parametrize("length", [7, 40])
def test_rwkv_7_is_the_recurrence_of_the_authors_and_gradients_reach_the_first_values(length):
    first, second = goose_pair()
    x = inputs(1, length)
    seq = SequenceInfo.make(1, length, x.device)
    got = [first(x, seq)[0][0], second(2 * x, seq)[0][0]]
    expected, v_first = goose(first, x[0])
    expected = [expected, goose(second, 2 * x[0], v_first)[0]]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    weights = [first.v_proj.weight, second.value_share, second.rate, second.decay_b_proj.weight, second.mix]
    for a, b in zip(*(torch.autograd.grad(out[1].square().sum(), weights) for out in (got, expected)), strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_the_start_of_goose_is_the_published_one():
    """Ramps of the authors' code for layer 1 of 4 and 64 channels in heads of 16, written out for single channels."""
    torch.manual_seed(0)
    config = RWKV7Config(num_heads=4, head_dim=16)
    mixer = build_mixer(config, context_of(layer_index=1, hidden_size=64, layers=[config, config]))
    mixer.init_weights(0.02)
    r01, r10 = 1 / 3, 3 / 4
    for n in (0, 1, 31, 63):
        linear, inside = n / 63 - 0.5, ((n % 16) - 7.5) / 7.5
        zigzag = inside * abs(inside)
        www = -6 + 6 * (n / 63) ** (1 + r01**0.3)
        assert mixer.decay[n].item() == pytest.approx(www + 0.5 + 2.5 * zigzag, abs=1e-5)
        assert mixer.rate[n].item() == pytest.approx(-0.19 + 0.3 * zigzag + 0.4 * linear, abs=1e-6)
        assert mixer.value_share[n].item() == pytest.approx(0.73 - 0.4 * linear, abs=1e-6)
        assert mixer.key_scale[n].item() == pytest.approx(0.71 - 0.1 * linear, abs=1e-6)
        for mix, exponent in zip(mixer.mix[:, n], (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            assert mix.item() == pytest.approx(1 - (n / 64) ** (exponent * r10), abs=1e-6)
    assert mixer.key_rate.unique().item() == pytest.approx(1.02)
    assert mixer.bonus.unique().item() == pytest.approx(-0.04)
    assert not mixer.o_proj.weight.any()
    for name, rank in config.ranks(context_of(hidden_size=64, layers=[config, config])).items():
        assert rank == 32
        assert not getattr(mixer, f"{name}_a_proj").weight.any()
        b = getattr(mixer, f"{name}_b_proj").weight
        torch.testing.assert_close(b.T @ b, 0.01 * torch.eye(rank), atol=1e-6, rtol=0)
    for name, bound in (("r", 0.5 / 8), ("k", 0.05 / 8), ("v", 0.5 / 8)):
        weight = getattr(mixer, f"{name}_proj").weight
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_layers_of_rwkv_7_have_equal_channels():
    first, other = RWKV7Config(num_heads=2, head_dim=8), RWKV7Config(num_heads=1, head_dim=8)
    with pytest.raises(ConfigError, match=r"num_heads: has other channels than layer 0, .*; got 8; expected 16"):
        build_mixer(other, context_of(layer_index=1, layers=[first, other]))


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


@pytest.mark.parametrize("place", ["output", "inner"])
def test_deep_embed_is_the_formula_of_the_authors_and_starts_at_one(place):
    """RWKV-8 rc00 multiplies the output, RWKV-7a the inner tensor; at first neither changes the channel mix."""
    torch.manual_seed(0)
    options = {"intermediate_size": 20, "deep_embed_rank": 3}
    size = replace(context_of(), vocab_size=11)
    module = build_feed_forward(RWKVChannelMixConfig(**options, deep_embed=place), size).double()
    plain = build_feed_forward(RWKVChannelMixConfig(**options), size).double()
    module.init_weights(0.3)
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if "deep" not in name})
    x, ids = inputs(1, 5), torch.tensor([[3, 0, 3, 10, 7]])
    seq = SequenceInfo.make(1, 5, x.device)
    seq.token_ids_BT = ids
    with torch.no_grad():
        torch.testing.assert_close(module(x, seq)[0], plain(x, seq)[0])
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        k = torch.clamp(module.key_proj(x * (1 - module.mix_k) + before * module.mix_k), min=0) ** 2
        table = module.deep_embed.weight
        if place == "output":
            expected = module.value_proj(k) * table[ids]
        else:
            gates = [(token @ module.deep_a_proj.weight.T) @ table[i].view(3, 3) @ module.deep_b_proj.weight.T
                     + module.deep_scale for token, i in zip(x[0], ids[0], strict=True)]
            expected = module.value_proj(k * torch.stack(gates))
        torch.testing.assert_close(module(x, seq)[0], expected)


def test_deep_embed_follows_the_ids_of_a_model_in_every_use():
    config = load_config("train", ["model=rwkv6_tiny", "model.num_layers=2", "model.feed_forward.deep_embed=output"])
    lm = hybridlm.build_model(config).eval()
    with torch.no_grad():
        for layer in lm.layers:
            layer.feed_forward.deep_embed.weight.normal_()
        ids = torch.randint(512, (2, 9))
        full, state = lm(ids).logits, lm.new_state(2, 9)
        torch.testing.assert_close(torch.cat([lm(ids[:, t : t + 1], state=state).logits for t in range(9)], 1), full)
        torch.testing.assert_close(lm(ids.view(1, -1), cu_seqlens=[0, 9, 18]).logits.view_as(full), full)
        with pytest.raises(ValueError, match="pass input_ids"):
            lm(None, inputs_embeds=lm.embed(ids))


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
