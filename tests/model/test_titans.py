"""The memory of Titans: the paper's formulas token by token with gradients of autograd, and the start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import TitansConfig, build_mixer
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, inputs, run

T, H = 11, 2


def causal_conv(conv, x):
    taps = conv.weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return F.silu(sum(padded[w : w + T] * conv.weight[:, w] for w in range(taps)))


@pytest.mark.parametrize("name", ["titans_linear", "titans_mlp"])
def test_the_memory_learns_with_momentum_and_decay(name):
    mixer, x = build(name), inputs(1, T)[0]
    config = mixer.config
    K, names = config.head_dim, list(config.memory_shapes)
    with torch.no_grad():
        q, k, v = (causal_conv(getattr(mixer, f"{n}_conv"), getattr(mixer, f"{n}_proj")(x)).view(T, H, K)
                   for n in "qkv")
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        alpha, eta, theta = (torch.sigmoid(getattr(mixer, f"{n}_proj")(x) + getattr(mixer, f"{n}_bias"))
                             for n in ("alpha", "eta", "theta"))

    def f(weights, y):
        z = y @ weights[0]
        return F.gelu(z, approximate="tanh") @ weights[1] if len(weights) == 2 else z

    o = torch.zeros(T, H, K, dtype=x.dtype)
    for h in range(H):
        memory = [getattr(mixer, n)[h].detach() for n in names]
        surprise = [torch.zeros_like(w) for w in memory]
        for t in range(T):
            if t % config.chunk == 0:
                start = [w.clone().requires_grad_() for w in memory]
            grads = torch.autograd.grad((f(start, k[t, h]) - v[t, h]).square().sum(), start)
            surprise = [eta[t, h] * s - config.max_rate * theta[t, h] * g for s, g in zip(surprise, grads, strict=True)]
            memory = [(1 - alpha[t, h]) * m + s for m, s in zip(memory, surprise, strict=True)]
            o[t, h] = f(memory, q[t, h])
    with torch.no_grad():
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
        o = o.flatten(1) * F.silu(mixer.g_proj(x))
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(o), rtol=1e-7, atol=1e-9)


def test_the_start():
    torch.manual_seed(0)
    mixer = build_mixer(TitansConfig(num_heads=2, head_dim=32), context())
    mixer.init_weights(0.02)
    for weights in (mixer.W1, mixer.W2, mixer.k_proj.weight):
        assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(mixer.alpha_bias.sigmoid(), torch.full((2,), 0.001))
    assert not mixer.eta_bias.any()
    assert not mixer.theta_bias.any()


@pytest.mark.parametrize(("options", "message"), [
    ({"chunk": 0}, "chunk: must be positive"), ({"max_rate": 0.0}, "max_rate: must be positive"),
    ({"conv_size": 1}, "conv_size: is not a convolution"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TitansConfig(**{"num_heads": 2, "head_dim": 8} | options)
