"""Test-time training: the paper's formulas token by token with gradients of autograd, and the published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import TTTConfig, build_mixer
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, inputs, run

T = 11


def rotated(x, places):
    """x [T, H, K] with its neighbouring dims as complex numbers, turned by the place in the mini-batch."""
    K = x.shape[-1]
    angle = places[:, None] / 10000.0 ** (torch.arange(0, K, 2) / K)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def causal_conv(conv, x):
    taps = conv.weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return conv.bias + sum(padded[w : w + T] * conv.weight[:, w] for w in range(taps))


@pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp"])
def test_the_memory_takes_gradient_steps_on_mini_batches(name):
    mixer, x = build(name), inputs(1, T)[0]
    mixer.place_scale.data[2] = -5.0  # a scale that is clamped to zero
    H, K, M = mixer.config.num_heads, mixer.config.head_dim, mixer.config.mini_batch
    names = list(mixer.config.memory_shapes())
    q = mixer.q_proj(x)
    q, k = (causal_conv(mixer.q_conv, q), causal_conv(mixer.k_conv, q)) if name == "ttt_mlp" else (q, mixer.k_proj(x))
    places = torch.arange(T) % M
    q, k = (rotated(y.view(T, H, K), places) for y in (q, k))
    v = mixer.v_proj(x).view(T, H, K)
    rate = torch.sigmoid(mixer.rate_proj(x) + mixer.rate_bias) / K

    def f(weights, y, h):
        z = y @ weights[0] + weights[1]
        if name == "ttt_mlp":
            z = F.gelu(z, approximate="tanh") @ weights[2] + weights[3]
        z = (z - z.mean()) / (z.var(correction=0) + 1e-6).sqrt()
        return z * mixer.memory_norm_weight[h] + mixer.memory_norm_bias[h]

    o = torch.zeros(T, H, K, dtype=x.dtype)
    for h in range(H):
        start = [getattr(mixer, n)[h].detach() for n in names]
        for first in range(0, T, M):
            sums = [torch.zeros_like(w) for w in start]
            for j in range(first, min(first + M, T)):
                leaves = [w.clone().requires_grad_() for w in start]
                loss = 0.5 * (f(leaves, k[j, h].detach(), h) - (v[j, h] - k[j, h]).detach()).square().sum()
                grads = torch.autograd.grad(loss, leaves)
                sums = [total + rate[j, h].detach() * grad for total, grad in zip(sums, grads, strict=True)]
                scale = max(1 / (j - first + 1) + mixer.place_scale[j - first].item(), 0.0)
                now = [w - scale * total for w, total in zip(start, sums, strict=True)]
                o[j, h] = (q[j, h] + f(now, q[j, h], h)).detach()
            start = now
    with torch.no_grad():
        y = o.flatten(1)
        y = F.layer_norm(y, y.shape[-1:], mixer.o_norm.weight, mixer.o_norm.bias, 1e-6)
        if name == "ttt_mlp":
            y = F.gelu(mixer.g_proj(x), approximate="tanh") * y
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(y), rtol=1e-6, atol=1e-6)


def test_the_start_is_the_published_one():
    torch.manual_seed(0)
    mixer = build_mixer(TTTConfig(num_heads=4, head_dim=16, memory="mlp"), context())
    mixer.init_weights(0.1)
    assert mixer.W1.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.W2.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.rate_proj.weight.std().item() == pytest.approx(0.1, rel=0.2)
    for name in ("b1", "b2", "place_scale", "rate_bias", "memory_norm_bias"):
        assert not getattr(mixer, name).any(), name
    assert torch.equal(mixer.memory_norm_weight, torch.ones(4, 16))


def test_rows_that_are_divided_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match="each mini-batch learns from the weights before it"):
        TTTConfig(num_heads=2, head_dim=8).check_context_parallel(2, 64)


@pytest.mark.parametrize(("options", "message"), [
    ({"mini_batch": 0}, "mini_batch: must be positive"),
    ({"conv_size": 1}, "conv_size: is not a convolution"),
    ({"head_dim": 7}, "head_dim: must rotate an even number of dims"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TTTConfig(**{"num_heads": 2, "head_dim": 8} | options)
