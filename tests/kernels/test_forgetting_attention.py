"""Forgetting attention: equal to the dense formula, in memory that does not grow with the square of a row."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from hybridlm_kernels import attention, forgetting_attention
from hybridlm_kernels.ops.forgetting_attention import torch_backend
from tests.support.kernel_compare import assert_same_function, error, tensors

# rows, queries, keys, query heads, key heads, key dim, value dim
SHAPES = [(1, 1, 1, 1, 1, 4, 4), (2, 37, 37, 4, 2, 8, 6), (1, 140, 290, 2, 1, 8, 8), (2, 1, 50, 4, 4, 8, 12)]


def case(batch, queries, keys, heads, groups, dim, v_dim, dtype=torch.float64, strength=1.0):
    q, k, v, raw = tensors((batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, v_dim),
                           (batch, keys, heads), dtype=dtype)
    return q, k, v, (strength * F.logsigmoid(raw.detach())).requires_grad_()


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, window):
    inputs = case(*shape)
    assert_same_function(lambda backend: forgetting_attention(*inputs, window=window, backend=backend), inputs, 1e-12)


@pytest.mark.parametrize("window", [None, 16])
def test_packed_equals_reference_and_separate_documents(window):
    inputs = case(2, 70, 70, 4, 2, 8, 8)
    cuts = [0, 1, 3, 40, 40, 70, 139, 140]
    assert_same_function(lambda backend: forgetting_attention(*inputs, scale=0.3, window=window, cu_seqlens=cuts,
                                                              backend=backend), inputs, 1e-12)
    packed = forgetting_attention(*inputs, window=window, cu_seqlens=cuts).flatten(0, 1)
    for start, stop in pairwise(sorted(set(cuts))):
        alone = forgetting_attention(*(x.flatten(0, 1)[None, start:stop] for x in inputs), window=window)[0]
        torch.testing.assert_close(packed[start:stop], alone, rtol=1e-12, atol=1e-12)


def test_without_forgetting_it_is_attention():
    q, k, v, g = case(1, 60, 60, 4, 2, 8, 8)
    torch.testing.assert_close(forgetting_attention(q, k, v, torch.zeros_like(g)), attention(q, k, v))


def test_the_weights_are_products_of_gates():
    """exp(q . k) times every gate between key and query, normalised: the paper's first form, token by token."""
    q, k, v, g = (x.detach() for x in case(1, 12, 12, 1, 1, 4, 4))
    o = forgetting_attention(q, k, v, g, scale=1.0, backend="reference")
    gates = g[0, :, 0].exp()
    for t in range(12):
        weights = torch.stack([torch.dot(q[0, t, 0], k[0, s, 0]).exp() * gates[s + 1 : t + 1].prod()
                               for s in range(t + 1)])
        torch.testing.assert_close(o[0, t, 0], (weights / weights.sum()) @ v[0, : t + 1, 0])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_gate_of_zero_hides_all_earlier_keys(backend):
    q, k, v, g = case(1, 30, 30, 2, 2, 8, 8)
    closed = g.detach().clone()
    closed[:, 11] = -torch.inf
    closed.requires_grad_()
    o = forgetting_attention(q, k, v, closed, backend=backend)
    after = forgetting_attention(q[:, 11:], k[:, 11:], v[:, 11:], g[:, 11:], backend=backend)
    torch.testing.assert_close(o[:, 11:], after)
    grads = torch.autograd.grad(o.square().sum(), (q, k, v, closed))
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_a_long_row_loses_no_bit_of_near_gates():
    """fp32 sums of gates near -4000 are 2.4e-4 apart; the bias between neighbours must not be."""
    q, k, v, g = (x.detach() for x in case(1, 260, 260, 1, 1, 4, 4, strength=20.0))
    o = forgetting_attention(q.float(), k.float(), v.float(), g.float())
    expected = forgetting_attention(q.float().double(), k.float().double(), v.float().double(), g.float().double())
    assert g.sum() < -3000
    assert (o - expected).abs().max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_change_no_bit(dtype):
    inputs = [x.detach() for x in case(1, 150, 150, 2, 1, 8, 8, dtype=dtype)]
    before = forgetting_attention(*inputs)
    for t in (0, 126, 127, 128):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, t + 1 :] -= 1.0
        after = forgetting_attention(*changed)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_keeps_no_scores(monkeypatch):
    monkeypatch.setattr(torch_backend, "BLOCK_QUERIES", 16)
    inputs = case(1, 256, 256, 2, 1, 4, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        forgetting_attention(*inputs)
    assert max(kept) <= 256 * 2 * 4


def test_half_precision_is_near():
    inputs = case(1, 60, 60, 4, 2, 8, 8)
    half = forgetting_attention(*(x.bfloat16() for x in inputs[:3]), inputs[3].float())
    assert half.dtype == torch.bfloat16
    assert error(half, forgetting_attention(*inputs)) < 0.02


@pytest.mark.parametrize(("index", "shape", "message"), [
    (1, (2, 37, 3, 8), r"k and v must be|q, k and v must be"),
    (3, (2, 37, 2), r"g must be \[rows, keys, query heads\] = \[2, 37, 4\]; got \[2, 37, 2\]"),
])
def test_shapes_that_do_not_fit(index, shape, message):
    inputs = [x.detach() for x in case(*SHAPES[1])]
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        forgetting_attention(*inputs)
