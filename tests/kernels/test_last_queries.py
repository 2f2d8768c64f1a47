"""The last queries of packed rows: what they select and learn is what they would among all queries.

B rows, T queries, S keys, J index heads, I index dim, H query heads, G key heads, K key dim.
"""

import pytest
import torch

from hybridlm_kernels import (
    CuSeqlens,
    Pools,
    attention_recall,
    indexer_kl,
    indexer_topk,
    pooled_indexer_kl,
    pooled_topk,
)

B, S, J, I, H, G, K, TOPK, SIZE = 2, 23, 3, 4, 4, 2, 5, 6, 3
BORDERS = [0, 4, 15, 23, 24, 33, 46]
BACKENDS = ["torch", "reference"]


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    shapes = (B, S, J, I), (B, S, I), (B, S, J), (B, S, H, K), (B, S, G, K)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def pools(queries):
    return Pools.of(B, queries, S, SIZE, torch.device("cpu"), CuSeqlens(BORDERS))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 9])
def test_selection(tensors, backend, queries):
    q, k, w, *_ = tensors
    last = slice(S - queries, None)
    whole = indexer_topk(q, k, w, TOPK, cu_seqlens=BORDERS, num_first=1, num_local=2, backend=backend)
    part = indexer_topk(q[:, last], k, w[:, last], TOPK, cu_seqlens=BORDERS, num_first=1, num_local=2, backend=backend)
    assert part.equal(whole[:, last])
    k_BPI = torch.randn(B, pools(S).number, I, dtype=torch.float64)
    whole = pooled_topk(q, k_BPI, w, pools(S), 2, backend=backend)
    assert pooled_topk(q[:, last], k_BPI, w[:, last], pools(queries), 2, backend=backend).equal(whole[:, last])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooled", [False, True])
def test_losses_of_both_parts_add_up(tensors, backend, pooled):
    """The first 14 keys of each row with their queries, and the last 9 queries with all keys, give the whole loss."""
    q, k, w, main_q, main_k = tensors
    cut = S - 9
    if pooled:
        k = torch.randn(B, pools(S).number, I, dtype=torch.float64)

    def loss(begin, stop):
        cu = CuSeqlens([*(b for row in range(B) for b in dict.fromkeys(
            row * stop + min(max(border - row * S, 0), stop) for border in BORDERS[:-1])
            if b < (row + 1) * stop), B * stop])
        part, rows = k, slice(begin, stop)
        index, main = (q[:, rows], part[:, :stop], w[:, rows]), (main_q[:, rows], main_k[:, :stop])
        if not pooled:
            return indexer_kl(*index, *main, cu_seqlens=cu, backend=backend).loss, B * (stop - begin)
        where = Pools.of(B, stop - begin, stop, SIZE, q.device, cu)
        index = index[0], part[:, : where.number], index[2]
        return (pooled_indexer_kl(*index, *main, where, cu_seqlens=cu, backend=backend).loss,
                int((where.count_BT > 0).sum()))

    (whole, n), (first, n_first), (last, n_last) = loss(0, S), loss(0, cut), loss(cut, S)
    assert n == n_first + n_last
    torch.testing.assert_close((first * n_first + last * n_last) / n, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recall(tensors, backend):
    q, k, w, main_q, main_k = tensors
    listed = indexer_topk(q, k, w, 2, cu_seqlens=BORDERS)
    seen_BT = CuSeqlens(BORDERS).positions().view(B, S) + 1
    chose_BT = seen_BT > 2
    total = 0.0
    for t in range(S):  # one query at a time, as the last of the row up to it
        borders = [*(row * (t + 1) + (b - row * S) for row in range(B) for b in BORDERS[:-1] if 0 <= b - row * S <= t),
                   B * (t + 1)]
        found = attention_recall(main_q[:, t : t + 1], main_k[:, : t + 1], listed[:, t : t + 1], cu_seqlens=borders,
                                 backend=backend)
        total += found.mass * int(chose_BT[:, t].sum())
    whole = attention_recall(main_q, main_k, listed, cu_seqlens=BORDERS, backend=backend)
    torch.testing.assert_close(total / int(chose_BT.sum()), whole.mass)
