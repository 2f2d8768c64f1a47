"""Mixture of memories: a recurrence per memory over the tokens sent to it, token by token; the published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import MoMConfig, build_mixer
from hybridlm.model.mixers.mom import Routing
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.recurrence.chunk_layout import MAX_CHUNK_TOKENS
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, inputs, run

T, H, K, V, M = 13, 2, 6, 4, 3


def causal_conv(weight, x):
    padded = F.pad(x, (0, 0, 3, 0))
    return F.silu(sum(padded[w : w + len(x)] * weight[:, w] for w in range(4)))


def gated_deltanet(mixer, x, memory):
    """Outputs [tokens, H, V] of one memory on the tokens it sees."""
    n = len(x)

    def of_memory(projection):
        return projection(x).view(n, M + 1, -1)[:, memory]

    q = causal_conv(mixer.q_conv.weight, mixer.q_proj(x)).view(n, H, K)
    k = causal_conv(mixer.k_conv.weight, of_memory(mixer.k_proj)).view(n, H, K)
    v = causal_conv(mixer.v_conv.weight, of_memory(mixer.v_proj)).view(n, H, V)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = torch.sigmoid(of_memory(mixer.b_proj))
    decay = torch.exp(-mixer.A_log.exp() * torch.log1p((of_memory(mixer.a_proj) + mixer.dt_bias).exp()))
    o, S = torch.zeros(n, H, V, dtype=x.dtype), torch.zeros(H, K, V, dtype=x.dtype)
    for t in range(n):
        S = decay[t, :, None, None] * S
        S = S + beta[t, :, None, None] * k[t][..., None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))[:, None]
        o[t] = torch.einsum("hkv,hk->hv", S, q[t]) / K**0.5
    return o


@pytest.mark.parametrize("length", [1, 7, 100])
def test_rows_of_zeros_are_as_long_as_a_memory_could_be_whatever_the_routing(length):
    seq = SequenceInfo.make(2, length, torch.device("cpu"))
    for ids in (torch.zeros(2 * length, 1, dtype=torch.int64), torch.arange(2 * length)[:, None] % M):
        routing = Routing.of(ids, M, seq)
        longest = min(length, MAX_CHUNK_TOKENS)  # of a chunk of the recurrence
        assert min(max(routing.borders.lengths), MAX_CHUNK_TOKENS) == longest == routing.borders.lengths[-1]
        assert routing.rows(torch.ones(2 * length, 3)).shape == (1, 2 * length + longest, 3)


def test_memories_see_the_tokens_that_are_sent_to_them():
    mixer, x = build("mom"), inputs(1, T)[0]
    with torch.no_grad():
        p = torch.softmax(mixer.router(x), -1)
        chosen = p >= p.sort(-1, descending=True).values[:, 1:2]
        assert all(0 < n < T for n in chosen.sum(0).tolist())  # every memory sees some tokens, none sees all
        weight = torch.where(chosen, p, 0.0)
        weight = weight / weight.sum(-1, keepdim=True)
        o = gated_deltanet(mixer, x, M)
        for m in range(M):
            seen = chosen[:, m]
            o[seen] += weight[seen, m, None, None] * gated_deltanet(mixer, x[seen], m)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
        o = o.flatten(1) * F.silu(mixer.g_proj(x))
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(o), rtol=1e-7, atol=1e-9)


def test_the_balance_loss_is_least_where_tokens_spread():
    mixer = build("mom").train()
    seq_inputs = inputs(2, 40)
    losses = []
    for scale in (0.0, 50.0):
        with torch.no_grad():
            mixer.router.weight.mul_(0.0)
            mixer.router.weight[0] += scale
        aux = mixer(seq_inputs.abs(), SequenceInfo.make(2, 40, torch.device("cpu")))[1]
        losses.append(aux["loss/memory_balance"].item())
    assert losses[0] == pytest.approx(1.0)
    assert losses[1] == pytest.approx(M / 2, rel=1e-3)  # one memory always has all the probability and is chosen
    assert "loss/memory_balance" not in mixer.eval()(seq_inputs, SequenceInfo.make(2, 40, torch.device("cpu")))[1]


def test_the_start_is_the_published_one():
    torch.manual_seed(0)
    mixer = build_mixer(MoMConfig(num_heads=64, head_dim=2), context())
    mixer.init_weights(0.02)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 0 < A.min() < 2
    assert 14 < A.max() < 16
    assert 1e-3 <= dt.min() < 2e-3
    assert 5e-2 < dt.max() <= 1e-1 * 1.001
    assert mixer.k_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.q_conv.weight.abs().max() <= 0.5


@pytest.mark.parametrize(("options", "message"), [
    ({"topk": 5}, "topk: must not exceed num_memories"),
    ({"num_memories": 0}, "num_memories: must be positive"),
    ({"balance_loss": -1.0}, "balance_loss: must not be negative"),
    ({"conv_size": 0}, "conv_size: is not a convolution"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MoMConfig(**{"num_heads": 2, "head_dim": 8} | options)
