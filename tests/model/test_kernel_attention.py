"""Kernelised attention: every feature map against its paper's formula over all pairs of tokens, and its start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hybridlm.errors import ConfigError
from hybridlm.model.contract_check import Subject
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import AttentionConfig, KernelAttentionConfig, build_mixer
from tests.support.layer_parity import context
from tests.support.mixer_cases import context_of, inputs, run

K, LENGTH = 4, 6


def dpfp(x: Tensor, products: int) -> Tensor:
    both = [max(v, 0.0) for v in x.tolist()] + [max(-v, 0.0) for v in x.tolist()]
    return torch.tensor([both[i] * both[(i - j) % len(both)] for j in range(1, products + 1)
                         for i in range(len(both))], dtype=x.dtype)


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    y = (weight @ x).exp()
    return torch.cat([y / y.sum(), (1 / y) / (1 / y).sum()])


def similarity(name: str, phi, head: int, q: Tensor, k: Tensor, i: int, j: int) -> Tensor:
    """The weight of key j for query i by the paper's formula; `phi` holds the parameters."""
    root = math.sqrt(K)
    if name == "elu1":
        return (torch.where(q > 0, q + 1, q.exp()) * torch.where(k > 0, k + 1, k.exp())).sum()
    if name == "relu":
        return q.relu() @ k.relu()
    if name == "softmax":
        return (q.exp() / q.exp().sum()) @ (k.exp() / k.exp().sum())
    if name == "dpfp":
        return dpfp(q, 4) @ dpfp(k, 4)
    if name == "cosformer":
        return q.relu() @ k.relu() * math.cos(math.pi / 2 * (i - j) / 10)
    if name == "taylor":
        return 1 + q @ k / root + (q @ k / root) ** 2 / 2
    if name == "rebased":
        return (layer_norm(q, phi.q_norm) @ layer_norm(k, phi.k_norm)) ** 2 / K
    if name == "hedgehog":
        return hedgehog(q, phi.q_weight[head]) @ hedgehog(k, phi.k_weight[head])
    if name == "t2r":
        q_bias, k_bias = phi.q_bias.view(2, 3), phi.k_bias.view(2, 3)
        return (phi.q_weight[head] @ q + q_bias[head]).relu() @ (phi.k_weight[head] @ k + k_bias[head]).relu()
    if name == "performer":
        q, k = q / K**0.25, k / K**0.25
        exponents = phi.omega @ q - q @ q / 2
        q_features = (exponents - exponents.max()).exp() + 1e-4
        return q_features @ ((phi.omega @ k - k @ k / 2).exp() + 1e-4) / 7
    assert name == "rfa"
    sigma = phi.sigma.view(2, K)[head]
    q, k = (sigma * x / (x.norm() + 1e-3) for x in (q, k))
    return (phi.omega[head] @ (q - k)).cos().mean()


@pytest.mark.parametrize(("name", "options"), [
    ("elu1", {}), ("relu", {"normalizer_eps": 1e-2}), ("softmax", {}), ("dpfp", {}), ("taylor", {}), ("rebased", {}),
    ("cosformer", {"max_length": 10, "normalizer": "floor"}), ("hedgehog", {}), ("t2r", {"features": 3}),
    ("performer", {"features": 7}), ("rfa", {"normalizer": "floor", "normalizer_eps": 1.0}),
    ("rfa", {"normalizer": "floor", "normalizer_eps": 0.3, "gate": "scalar"}), ("hedgehog", {"normalizer": "none"})])
def test_weights_are_those_of_the_paper_over_all_pairs(name, options):
    config = KernelAttentionConfig(num_heads=2, head_dim=K, value_head_dim=3, feature_map=name, **options)
    mixer, x = Subject(config, context_of()).build(), inputs(1, LENGTH)
    with torch.no_grad():
        q, k = mixer.q_proj(x[0]).view(LENGTH, 2, K), mixer.k_proj(x[0]).view(LENGTH, 2, K)
        v = mixer.v_proj(x[0]).view(LENGTH, 2, 3)
        forget = torch.ones(LENGTH, 2, dtype=x.dtype)
        write = forget
        if config.gate == "scalar":
            forget = torch.sigmoid(mixer.gate_proj(x[0]) + mixer.gate_bias)
            write = 1 - forget
        o = torch.zeros(LENGTH, 2, 3, dtype=x.dtype)
        for h in range(2):
            for i in range(LENGTH):
                total = torch.zeros((), dtype=x.dtype)
                for j in range(i + 1):
                    weight = similarity(name, mixer.feature_map, h, q[i, h], k[j, h], i, j)
                    weight = weight * write[j, h] * forget[j + 1 : i + 1, h].prod()
                    o[i, h] += weight * v[j, h]
                    total += weight
                if config.normalizer == "add":
                    o[i, h] /= total + config.normalizer_eps
                elif config.normalizer == "floor":
                    o[i, h] /= max(total, config.normalizer_eps)
        torch.testing.assert_close(run(mixer, x)[0], mixer.o_proj(o.flatten(1)))


def start(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    mixer = build_mixer(KernelAttentionConfig(num_heads=2, head_dim=16, **options), context())
    mixer.init_weights(0.02)
    return mixer.feature_map


def test_maps_start_as_published():
    assert torch.equal(start(feature_map="hedgehog").k_weight[1], torch.eye(16))
    t2r = start(feature_map="t2r", features=32)
    assert t2r.q_weight.abs().max() <= 0.25
    assert t2r.q_weight.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.1)
    rfa = start(feature_map="rfa", features=64)
    assert torch.equal(rfa.sigma, torch.ones(32))
    assert rfa.omega.std().item() == pytest.approx(1.0, rel=0.1)
    norm = start(feature_map="rebased").q_norm
    assert torch.equal(norm.weight, torch.ones(16))
    assert not norm.bias.any()


def test_directions_of_the_performer_are_orthogonal_in_blocks_and_long_as_normal_vectors():
    omega = start(feature_map="performer").omega
    assert omega.shape == (int(16 * math.log(16)), 16)
    products = omega[:16] @ omega[:16].T
    torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-4, rtol=0.0)
    assert omega.square().sum(1).mean().item() == pytest.approx(16, rel=0.2)


def test_random_features_of_the_performer_approximate_softmax():
    phi = start(feature_map="performer", features=4096)
    generator = torch.Generator().manual_seed(1)
    q, k = 0.5 * torch.randn(2, 2, 1, 1, 2, 16, generator=generator)
    positions = torch.zeros(1, 1, dtype=torch.int64)
    got = [(phi(q[0], "q", positions) * phi(x, "k", positions)).sum(-1) for x in k]
    ratio = (q[0] * (k[0] - k[1])).sum(-1).div(4.0).exp()  # of two weights of one query, scale 16^-0.5
    torch.testing.assert_close(got[0] / got[1], ratio, rtol=0.15, atol=0.0)


@pytest.mark.parametrize(("options", "message"), [
    ({"feature_map": "taylor", "features": 8}, "features: feature_map=taylor has a fixed size; got 8; expected null"),
    ({"feature_map": "dpfp", "features": 8}, "features: rolls by more places than there are"),
    ({"max_length": 8}, "max_length: needs feature_map=cosformer"),
    ({"normalizer_eps": 0.0}, "normalizer_eps: must be positive"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        KernelAttentionConfig(num_heads=2, head_dim=4, **options)


def test_a_longer_model_does_not_change_cosformer_with_a_length_of_its_own():
    x = inputs(1, LENGTH)
    outputs = {}
    for position in (64, 128):
        for length in (None, 32):
            config = KernelAttentionConfig(num_heads=2, head_dim=K, feature_map="cosformer", max_length=length)
            layer = context_of()
            layer.max_position = position
            outputs[position, length] = run(Subject(config, layer).build(), x)
    assert torch.equal(outputs[64, 32], outputs[128, 32])
    assert not torch.allclose(outputs[64, None], outputs[128, None])


def test_weights_of_softmax_attention_are_taken_over_where_heads_fit():
    old = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6)
    tensors = dict(Subject(old, context_of()).build().named_parameters())
    wide = KernelAttentionConfig(num_heads=4, head_dim=6, feature_map="t2r")
    fits = wide.initial_weights_from(old, tensors, NormConfig())
    assert fits.keys() == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
    assert torch.equal(fits["q_proj.weight"], tensors["q_proj.weight"])
    assert torch.equal(fits["k_proj.weight"][6:12], tensors["k_proj.weight"][:6])  # the second head shared the first's
    small = KernelAttentionConfig(num_heads=4, head_dim=3, value_head_dim=6, feature_map="taylor")
    assert small.initial_weights_from(old, tensors, NormConfig()).keys() == {"v_proj.weight", "o_proj.weight"}
