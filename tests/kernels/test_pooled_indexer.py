"""The pooled indexer against its reference and by hand: selection, loss, gradients, packing, memory."""

import itertools

import pytest
import torch

from hybridlm_kernels import CuSeqlens, Pools, attention_recall, indexer_kl, indexer_topk, pooled_topk
from hybridlm_kernels import pooled_indexer_kl as pooled_kl
from hybridlm_kernels.ops.indexer_kl import torch_backend as blocks
from tests.support.kernel_compare import LargestTensor, assert_same_function, tensors

CPU = torch.device("cpu")
# rows, queries, keys, tokens a pool
SHAPES = [(1, 3, 3, 4), (2, 37, 37, 4), (1, 90, 90, 16), (2, 1, 30, 4), (1, 20, 50, 3), (2, 12, 12, 1)]


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK_ELEMENTS", 2000)


def case(batch, queries, keys, size, cuts=None, dtype=torch.float64):
    pools = Pools.of(batch, queries, keys, size, CPU, cuts)
    return pools, tensors((batch, queries, 3, 4), (batch, pools.number, 4), (batch, queries, 3),
                          (batch, queries, 4, 8), (batch, keys, 2, 8), dtype=dtype)


def borders(batch, length):
    inner = {1, 3, length // 2, batch * length - length // 3, batch * length - 1}
    return sorted({*range(0, batch * length + 1, length), *(b for b in inner if 0 < b < batch * length)})


def with_packing(shape, packed):
    shape = (shape[0], shape[2], *shape[2:]) if packed else shape
    return shape, borders(*shape[:2]) if packed else None


def by_hand(scores, position, begin, size, topk):
    """Tokens that a query at `position` of a document from `begin` on reads, and its complete pools."""
    complete = (position - begin + 1) // size
    best = sorted(range(complete), key=lambda p: (-scores[p], p))[:topk]
    tail = set(range(begin + size * complete, position + 1))
    return tail | {begin + size * p + r for p in best for r in range(size)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_complete_pools_of_the_document_and_the_open_tail(shape, packed):
    (batch, queries, keys, size), cuts = with_packing(shape, packed)
    pools, (q, k, w, *_) = case(batch, queries, keys, size, cuts)
    score = torch.einsum("btj,btjp->btp", w, torch.einsum("btji,bpi->btjp", q, k).relu())
    for backend in ("torch", "reference"):
        chosen = pooled_topk(q, k, w, pools, 2, backend=backend)
        assert chosen.shape == (batch, queries, 2 * size + size - 1)
        for b, t in itertools.product(range(batch), range(queries)):
            position = keys - queries + t
            begin = max(c - b * keys for c in cuts if c <= b * keys + position) if cuts else 0
            first = int(pools.first_BT[b, t])
            tokens = [s for s in chosen[b, t].tolist() if s >= 0]
            assert len(tokens) == len(set(tokens))
            assert set(tokens) == by_hand(score[b, t, first:].tolist(), position, begin, size, 2)


def test_first_and_last_pools_can_be_always_selected():
    pools, (q, k, w, *_) = case(1, 50, 50, 4, [0, 21, 50])
    for backend in ("torch", "reference"):
        chosen = pooled_topk(q, k, w, pools, 3, num_first=1, num_local=1, backend=backend)
        for t in range(50):
            begin = 0 if t < 21 else 21
            complete = (t - begin + 1) // 4
            if complete:
                assert {begin, begin + 4 * (complete - 1)} <= set(chosen[0, t].tolist())
    assert torch.equal(*(pooled_topk(q, k, w, pools, 3, num_first=1, num_local=1, backend=b)
                         for b in ("torch", "reference")))


def test_ties_go_to_the_earlier_pool():
    pools, (q, k, w, *_) = case(1, 32, 32, 4)
    for backend in ("torch", "reference"):
        chosen = pooled_topk(torch.zeros_like(q), k, w, pools, 2, backend=backend)
        assert chosen[0, 31].tolist() == [*range(8), -1, -1, -1]
        assert chosen[0, 30].tolist() == [*range(8), 28, 29, 30]


@pytest.mark.parametrize("form", ["all", "listed"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_equals_its_reference(shape, packed, form):
    (batch, queries, keys, size), cuts = with_packing(shape, packed)
    pools, (q, k, w, main_q, main_k) = case(batch, queries, keys, size, cuts)
    index = pooled_topk(q, k, w, pools, 2) if form == "listed" else None

    def result(backend):
        return pooled_kl(q, k, w, main_q, main_k, pools, indices_BTN=index, scale=0.7, cu_seqlens=cuts,
                                 backend=backend)

    assert_same_function(lambda backend: torch.stack(result(backend)[:1]), (q, k, w), 1e-12)
    fast, slow = result("torch").entropy, result("reference").entropy
    assert fast == pytest.approx(slow.item(), rel=1e-12, abs=1e-12)


def test_the_loss_by_hand():
    """One query that sees two pools and a tail of one token."""
    pools, (q, k, w, main_q, main_k) = case(1, 1, 9, 4)
    p = torch.softmax(torch.einsum("hk,shk->hs", main_q[0, 0], main_k[0].repeat_interleave(2, 1)) / 8**0.5, -1).mean(0)
    target = torch.stack([p[:4].sum(), p[4:8].sum()]) / p[:8].sum()
    soft = torch.softmax(torch.einsum("j,jp->p", w[0, 0], (q[0, 0] @ k[0].T).relu()), -1)
    result = pooled_kl(q, k, w, main_q, main_k, pools)
    torch.testing.assert_close(result.loss, (target * (target / soft).log()).sum())
    torch.testing.assert_close(result.entropy, -(soft * soft.log()).sum().detach())


@pytest.mark.parametrize("listed", [False, True])
def test_gradients_by_finite_differences(listed):
    pools, (q, k, w, main_q, main_k) = case(1, 13, 13, 3)
    index = pooled_topk(q, k, w, pools, 2) if listed else None
    assert torch.autograd.gradcheck(lambda q, k, w: pooled_kl(
        q, k, w, main_q, main_k, pools, indices_BTN=index).loss, (q, k, w), eps=1e-6, atol=1e-7)


def test_pools_of_one_token_are_the_plain_indexer():
    pools, (q, k, w, main_q, main_k) = case(2, 30, 30, 1, [0, 10, 30, 60])
    index = pooled_topk(q, k, w, pools, 5)
    assert torch.equal(index, indexer_topk(q, k, w, 5, cu_seqlens=[0, 10, 30, 60]))
    for listed in (None, index):
        pooled = pooled_kl(q, k, w, main_q, main_k, pools, indices_BTN=listed, cu_seqlens=[0, 10, 30, 60])
        plain = indexer_kl(q, k, w, main_q, main_k, indices_BTN=listed, cu_seqlens=[0, 10, 30, 60])
        torch.testing.assert_close(pooled.loss, plain.loss)


@pytest.mark.parametrize("cuts", [None, [0, 7, 40]])
def test_recall_from_the_same_pass(cuts):
    pools, (q, k, w, main_q, main_k) = case(1, 40, 40, 4, cuts)
    index = pooled_topk(q, k, w, pools, 2)
    recall = attention_recall(main_q, main_k, index, cu_seqlens=cuts, backend="reference")
    for backend in ("torch", "reference"):
        same = pooled_kl(q, k, w, main_q, main_k, pools, recall_of_BTN=index, cu_seqlens=cuts, backend=backend)
        for one, other in zip(same.recall, recall, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", ["all", "listed"])
def test_attention_that_is_all_on_the_tail_teaches_nothing(form):
    """The pools' share rounds to zero: no query counts, and no gradient is lost in a division."""
    pools, (q, k, w, main_q, main_k) = case(1, 1, 9, 4)
    main_k = 1e4 * torch.nn.functional.one_hot(torch.tensor([0] * 8 + [1]), 8).double()[None, :, None]
    main_q = torch.zeros_like(main_q).index_fill_(-1, torch.tensor([1]), 1.0)
    index = pooled_topk(q, k, w, pools, 2) if form == "listed" else None
    for backend in ("torch", "reference"):
        loss = pooled_kl(q, k, w, main_q, main_k, pools, indices_BTN=index, backend=backend).loss
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, (q, k, w)))


@pytest.mark.parametrize("form", ["all", "listed"])
def test_memory_is_linear_in_the_length(form, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK_ELEMENTS", 2**14)

    def largest(length):
        pools, (q, k, w, main_q, main_k) = case(1, length, length, 16, dtype=torch.float32)
        with LargestTensor() as seen:
            index = pooled_topk(q, k, w, pools, 2)
            pooled_kl(q, k, w, main_q, main_k, pools, indices_BTN=index if form == "listed" else None,
                              recall_of_BTN=None if form == "listed" else index).loss.backward()
        return seen.numel

    assert largest(1200) <= 2.1 * largest(600) < 1200**2 / 8


def test_what_does_not_fit_is_refused():
    pools, (q, k, w, main_q, main_k) = case(1, 20, 20, 4)
    with pytest.raises(ValueError, match="k must be"):
        pooled_topk(q, k[:, :-1], w, pools, 2)
    with pytest.raises(ValueError, match="topk must be at least 1"):
        pooled_topk(q, k, w, pools, 1, num_first=1, num_local=1)
    with pytest.raises(ValueError, match="the pools are those of"):
        pooled_topk(q[:, 1:], k, w[:, 1:], pools, 2)
    with pytest.raises(ValueError, match="main_k must be"):
        pooled_kl(q, k, w, main_q, main_k[:, 1:], pools)
    with pytest.raises(ValueError, match="but the tensors hold"):
        Pools.of(1, 4, 20, 4, CPU, CuSeqlens([0, 4]))
