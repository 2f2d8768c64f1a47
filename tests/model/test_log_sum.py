"""RWKV-4 and AFT-simple: equal to transformers' layer and to the papers' sums, with the published start."""

from __future__ import annotations

import math

import pytest
import torch

from hybridlm.model.mixers import RWKV4Config, build_mixer
from hybridlm.model.mixers.common.log_sum import read_weighted_mean
from hybridlm.model.sequence import SequenceInfo
from tests.support.layer_parity import HIDDEN, TOLERANCE, context, ours, random_weights, token_inputs
from tests.support.mixer_cases import build, inputs, run


def test_equals_the_layer_of_transformers():
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    layer = RwkvSelfAttention(RwkvConfig(hidden_size=HIDDEN, num_hidden_layers=2), 1)
    random_weights(layer)
    layer.time_decay.data -= 1.5
    w = layer.state_dict()
    weights = {"decay": w["time_decay"], "bonus": w["time_first"],
               "mix": 1 - torch.stack([w[f"time_mix_{name}"][0, 0] for name in ("key", "value", "receptance")])}
    for name, theirs in (("k", "key"), ("v", "value"), ("r", "receptance"), ("o", "output")):
        weights[f"{name}_proj.weight"] = w[f"{theirs}.weight"]
    x = token_inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(RWKV4Config(), weights, x), layer(x)[0], **TOLERANCE)


@pytest.mark.parametrize("decay", [-3.0, -0.01, 0.0])
def test_the_sums_of_the_paper_over_all_pairs(decay):
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 37, 3, generator=generator, dtype=torch.float64)
    u, w = torch.randn(3, generator=generator, dtype=torch.float64), torch.full((3,), decay, dtype=torch.float64)
    y = read_weighted_mean(3 * k, v, w, u, SequenceInfo.make(1, 37, k.device))
    for t in range(37):
        weights = [torch.exp((t - 1 - s) * w + 3 * k[0, s]) for s in range(t)] + [torch.exp(u + 3 * k[0, t])]
        expected = sum(a * v[0, s] for s, a in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(y[0, t], expected, rtol=1e-10, atol=1e-10)


def test_keys_of_any_size_stay_finite_in_fp32():
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 70, 3, generator=generator)
    leaves = [x.requires_grad_() for x in (300.0 * k, v, torch.tensor([-2.0, -0.1, 0.0]), torch.zeros(3))]
    y = read_weighted_mean(*leaves, SequenceInfo.make(1, 70, k.device))
    assert all(torch.isfinite(x).all() for x in (y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert y.abs().max() <= v.abs().max() * 1.001  # a mean


def test_aft_simple_is_a_softmax_over_the_past_in_every_channel():
    mixer, x = build("aft_simple"), inputs(1, 6)
    with torch.no_grad():
        k, v = mixer.k_proj(x[0]), mixer.v_proj(x[0])
        y = torch.stack([(k[: t + 1].softmax(0) * v[: t + 1]).sum(0) for t in range(6)])
        torch.testing.assert_close(run(mixer, x)[0], mixer.o_proj(torch.sigmoid(mixer.q_proj(x[0])) * y))


def test_the_start_of_rwkv4_is_the_published_one():
    """Ramps of the authors' code for layer 1 of 4, written out for single channels."""
    mixer = build_mixer(RWKV4Config(), context(layer_index=1, num_layers=4))
    mixer.init_weights(0.02)
    r01, r10 = 1 / 3, 3 / 4
    for n in (0, 1, 31, 63):
        assert mixer.decay[n].item() == pytest.approx(-5 + 8 * (n / 63) ** (0.7 + 1.3 * r01), abs=1e-5)
        assert mixer.bonus[n].item() == pytest.approx(math.log(0.3) + 0.5 * ((n + 1) % 3 - 1), abs=1e-6)
        k, v, r = mixer.mix[:, n].tolist()
        assert k == pytest.approx(1 - (n / 64) ** r10, abs=1e-6)
        assert v == pytest.approx(1 - ((n / 64) ** r10 + 0.3 * r01), abs=1e-6)
        assert r == pytest.approx(1 - (n / 64) ** (0.5 * r10), abs=1e-6)
