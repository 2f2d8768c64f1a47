"""Attention with its total: the outputs of attention, the sum of exponentials, and gradients through both."""

import pytest
import torch

from hybridlm_kernels import attention, attention_total
from tests.support.kernel_compare import assert_same_function, tensors

# rows, queries, keys, query heads, key heads, key dim, value dim
SHAPES = [(2, 37, 37, 4, 2, 8, 6), (1, 140, 290, 2, 1, 4, 4), (2, 1, 50, 4, 4, 8, 12)]


def case(batch, queries, keys, heads, groups, dim, v_dim, dtype=torch.float64):
    return tensors((batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, v_dim), dtype=dtype)


def both(*inputs, **options):
    o, total = attention_total(*inputs, **options)
    return torch.cat([o, total[..., None]], -1)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, window):
    inputs = case(*shape)
    assert_same_function(lambda backend: both(*inputs, window=window, backend=backend), inputs, 1e-12)
    torch.testing.assert_close(attention_total(*inputs, window=window)[0], attention(*inputs, window=window))


def test_packed_equals_reference():
    inputs = case(2, 70, 70, 4, 2, 8, 8)
    cuts = [0, 1, 3, 40, 40, 70, 139, 140]
    assert_same_function(lambda backend: both(*inputs, scale=0.3, window=16, cu_seqlens=cuts, backend=backend), inputs,
                         1e-12)


def test_the_total_by_hand():
    q, k, v = (x.detach() for x in case(1, 5, 5, 1, 1, 4, 4))
    total = attention_total(q, k, v, scale=1.0, window=3)[1][0, :, 0]
    for t in range(5):
        scores = k[0, max(0, t - 2) : t + 1, 0] @ q[0, t, 0]
        torch.testing.assert_close(total[t], (scores - scores.max()).exp().sum())


def test_later_tokens_change_no_bit_and_no_score_is_kept():
    inputs = [x.detach() for x in case(1, 300, 300, 2, 1, 4, 4, dtype=torch.float32)]
    before = both(*inputs, window=40)
    for t in (0, 127, 128):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, t + 1 :] += 1.0
        assert torch.equal(before[:, : t + 1], both(*changed, window=40)[:, : t + 1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        both(*(x.requires_grad_() for x in inputs))
    assert max(kept) <= 300 * 2 * 5
