"""The indexer's selection, ties above all, and attention over what it selects."""

import itertools

import pytest
import torch

from hybridlm_kernels import attention, indexer_topk, sparse_attention
from hybridlm_kernels.ops.sparse_attention import torch_backend as eager
from tests.support.kernel_compare import LargestTensor, assert_same_function, error, tensors

# rows, queries, keys, index heads, index dim
INDEX_SHAPES = [(1, 1, 1, 1, 4), (2, 37, 37, 4, 8), (1, 200, 200, 2, 4), (2, 1, 50, 4, 8), (1, 20, 50, 1, 2),
                (3, 64, 64, 3, 4)]
# rows, queries, keys, query heads, key heads, key dim, value dim
SHAPES = [(1, 1, 1, 1, 1, 4, 4), (2, 37, 37, 4, 2, 8, 8), (1, 120, 120, 4, 1, 12, 8), (2, 1, 50, 4, 4, 8, 12),
          (1, 20, 50, 2, 2, 8, 8)]


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    monkeypatch.setattr(eager, "CPU_INDEX_ELEMENTS", 2000)
    monkeypatch.setattr(eager, "CPU_MASKED_ELEMENTS", 2000)


@pytest.fixture(params=["masked", "gathered"])
def strategy(request, monkeypatch):
    monkeypatch.setattr(eager, "COPY_COST", 1)
    monkeypatch.setattr(eager, "CPU_GATHERED_ELEMENTS", 2000)
    monkeypatch.setattr(eager, "GATHER_COST", -(10**6) if request.param == "gathered" else 10**12)
    return request.param


def index_case(batch, queries, keys, heads, dim, whole_numbers=False):
    inputs = [t.detach() for t in tensors((batch, queries, heads, dim), (batch, keys, dim),
                                          (batch, queries, heads), dtype=torch.float32)]
    return [t.round() for t in inputs] if whole_numbers else inputs


def borders(batch, length):
    inner = {1, 3, length // 2, batch * length - length // 3, batch * length - 1}
    return sorted({*range(0, batch * length + 1, length), *(b for b in inner if 0 < b < batch * length)})


def selections(batch, queries, keys, count, seed=0):
    """Distinct positions in random order with random holes; the first query has none."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(batch, queries, keys, generator=generator).argsort(-1)[..., :count]
    index = index.masked_fill(torch.rand(index.shape, generator=generator) < 0.3, -1)
    index[:, 0] = -1
    return index.to(torch.int32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("whole_numbers", [False, True])  # whole numbers tie at every level, not only at zero
@pytest.mark.parametrize("topk", [1, 7, 36, 37, 64, 400])
@pytest.mark.parametrize("shape", INDEX_SHAPES)
def test_selection_equals_reference(shape, topk, whole_numbers, packed):
    if packed and shape[1] != shape[2]:
        shape = (shape[0], shape[2], *shape[2:])
    q, k, w = index_case(*shape, whole_numbers=whole_numbers)
    cuts = borders(*shape[:2]) if packed else None
    got = indexer_topk(q, k, w, topk, cu_seqlens=cuts)
    assert got.dtype == torch.int32
    assert torch.equal(got, indexer_topk(q, k, w, topk, cu_seqlens=cuts, backend="reference"))


def test_ties_at_zero_go_to_the_lowest_positions():
    q, k = torch.ones(1, 40, 1, 2), torch.full((1, 40, 2), -1.0)  # every product is negative: relu gives zeros
    k[0, 30] = 1.0
    for w in (1.0, -1.0):  # -1 * 0 is -0, which must tie with 0
        index = indexer_topk(q, k, torch.full((1, 40, 1), w), 4)
        for t in range(40):
            best = [30] if w > 0 and t >= 30 else []
            others = [s for s in range(t + 1) if s != 30 or w > 0]
            expected = sorted((best + [s for s in others if s not in best])[:4])
            assert index[0, t].tolist() == expected + [-1] * (4 - len(expected))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("num_first", "num_local"), [(1, 0), (0, 4), (2, 5), (3, 4)])
def test_first_and_local_keys_are_always_selected(num_first, num_local, packed):
    q, k, w = index_case(2, 64, 64, 2, 4)
    cuts = borders(2, 64) if packed else [0, 64, 128]
    options = {"num_first": num_first, "num_local": num_local, "cu_seqlens": cuts}
    index = indexer_topk(q, k, w, 7, **options)
    assert torch.equal(index, indexer_topk(q, k, w, 7, **options, backend="reference"))
    for start, stop in itertools.pairwise(cuts):
        for t in range(start, stop):
            chosen = set(index[t // 64, t % 64].tolist()) - {-1}
            seen = range(start % 64, t % 64 + 1)
            assert len(chosen) == min(7, len(seen))
            assert chosen >= {*seen[:num_first], *(seen[-num_local:] if num_local else ())}


def test_selection_by_hand():
    q = torch.tensor([1.0]).view(1, 1, 1, 1)
    k = torch.tensor([3.0, 9.0, 1.0, 9.0, 5.0]).view(1, 5, 1)
    w = torch.ones(1, 1, 1)
    assert indexer_topk(q, k, w, 3).tolist() == [[[1, 3, 4]]]
    assert indexer_topk(q, k, w, 1).tolist() == [[[1]]]
    assert indexer_topk(q, k, w, 7).tolist() == [[[0, 1, 2, 3, 4, -1, -1]]]


def test_selection_of_earlier_queries_ignores_later_tokens():
    q, k, w = index_case(1, 150, 150, 2, 4)
    index = indexer_topk(q, k, w, 20)
    for cut in (1, 50, 149):
        others = [x.clone() for x in (q, k, w)]
        for x in others:
            x[:, cut:] = torch.randn_like(x[:, cut:])
        assert torch.equal(indexer_topk(*others, 20)[:, :cut], index[:, :cut])


def test_decoding_selects_as_the_whole():
    q, k, w = index_case(2, 80, 80, 4, 8, whole_numbers=True)
    whole = indexer_topk(q, k, w, 16)
    for t in (0, 15, 16, 79):
        assert torch.equal(indexer_topk(q[:, t : t + 1], k[:, : t + 1], w[:, t : t + 1], 16), whole[:, t : t + 1])
    assert torch.equal(indexer_topk(q[:, 30:60], k[:, :60], w[:, 30:60], 16), whole[:, 30:60])


def test_half_precision_scores_in_fp32():
    q, k, w = (x.bfloat16() for x in index_case(1, 100, 100, 4, 8))
    assert torch.equal(indexer_topk(q, k, w, 10), indexer_topk(q.double(), k.double(), w.double(), 10))


def test_selection_has_no_gradient():
    q, k, w = (x.requires_grad_() for x in index_case(1, 10, 10, 2, 4))
    assert not indexer_topk(q, k, w, 3).requires_grad


@pytest.mark.parametrize("count", [1, 5, 40, 120])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_reference(shape, count, strategy):
    batch, queries, keys, heads, groups, dim, v_dim = shape
    q, k, v = tensors((batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, v_dim))
    for index in (selections(batch, queries, keys, count), torch.full((batch, queries, count), -1)):
        assert_same_function(
            lambda backend, index=index: sparse_attention(q, k, v, index, scale=0.4, backend=backend), (q, k, v),
            1e-12)


def test_values_that_are_part_of_the_keys(strategy):
    """Absorbed MLA: the latent is key and value, and its gradient is the sum of both."""
    q, latent = tensors((2, 30, 4, 12), (2, 30, 1, 12))
    index = selections(2, 30, 30, 7)
    assert_same_function(
        lambda backend: sparse_attention(q, latent, latent[..., :8], index, backend=backend), (q, latent), 1e-12)


def test_the_cheaper_way_is_taken():
    def way(queries, keys, heads, groups, selected):
        q, k = torch.empty(1, queries, heads, 4), torch.empty(1, keys, groups, 4)
        return eager._choose_gathered_or_masked(q, k, torch.empty(1, queries, selected))[0]

    assert way(1024, 1024, 16, 1, 64) is eager.gathered_forward  # one key head, few keys of many
    assert way(1, 65536, 8, 8, 2048) is eager.gathered_forward  # decoding
    assert way(1024, 1024, 8, 8, 256) is eager.masked_forward
    assert way(64, 64, 8, 1, 64) is eager.masked_forward


def test_the_same_bits_every_time(strategy):
    q, k, v = tensors((1, 200, 4, 16), (1, 200, 1, 16), (1, 200, 1, 16), dtype=torch.float32)
    index = selections(1, 200, 200, 20)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (torch.autograd.grad(sparse_attention(q, k, v, index).square().sum(), (q, k, v))
                         for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_selection_gives_zeros(strategy):
    q, k, v = tensors((1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8))
    for index in (torch.full((1, 4, 3), -1), torch.zeros(1, 4, 0, dtype=torch.int32)):
        o = sparse_attention(q, k, v, index)
        assert torch.equal(o, torch.zeros_like(o))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize("packed", [False, True])
def test_everything_selected_is_dense_attention(packed, strategy):
    batch, length = 2, 60
    q, k, v = tensors((batch, length, 4, 16), (batch, length, 2, 16), (batch, length, 2, 8), dtype=torch.float32)
    cuts = borders(batch, length) if packed else None
    index = indexer_topk(*index_case(batch, length, length, 2, 4), length, cu_seqlens=cuts)
    sparse, dense = sparse_attention(q, k, v, index), attention(q, k, v, cu_seqlens=cuts)
    upstream = torch.randn_like(dense)
    pairs = zip((sparse, *torch.autograd.grad(sparse, (q, k, v), upstream)),
                (dense, *torch.autograd.grad(dense, (q, k, v), upstream)), strict=True)
    assert max(error(a, b) for a, b in pairs) < 1e-6


def test_later_tokens_change_no_bit(strategy):
    length = 130
    q, k, v = (t.detach() for t in tensors((1, length, 4, 16), (1, length, 2, 16), (1, length, 2, 16),
                                           dtype=torch.float32))
    parts = index_case(1, length, length, 2, 4)
    o = sparse_attention(q, k, v, indexer_topk(*parts, 12))
    for cut in (1, 31, 64, length - 1):
        others = [x.clone() for x in (q, k, v, *parts)]
        for x in others:
            x[:, cut:] = torch.randn_like(x[:, cut:])
        assert torch.equal(sparse_attention(*others[:3], indexer_topk(*others[3:], 12))[:, :cut], o[:, :cut])


def test_bf16_computes_in_fp32(strategy):
    q, k, v = tensors((1, 50, 2, 16), (1, 50, 1, 16), (1, 50, 1, 16), dtype=torch.bfloat16)
    index = indexer_topk(*index_case(1, 50, 50, 2, 4), 9)
    assert_same_function(lambda backend: sparse_attention(q, k, v, index, backend=backend), (q, k, v), 2e-3)


def test_memory_is_not_quadratic():
    def largest(length):
        q, k, v = tensors((1, length, 2, 4), (1, length, 2, 4), (1, length, 2, 4), dtype=torch.float32)
        parts = index_case(1, length, length, 2, 4)
        with LargestTensor() as seen:
            sparse_attention(q, k, v, indexer_topk(*parts, 8)).sum().backward()
        return seen.numel

    assert largest(1600) <= 2 * largest(800) < 1600 * 1600 // 16


def test_bad_arguments():
    q, k, w = index_case(2, 8, 8, 2, 4)
    for bad in ((q, k[:1], w, 3), (q, k[:, :5], w, 3), (q, k[..., :2], w, 3), (q, k, w[:, :, :1], 3), (q, k, w, 0)):
        with pytest.raises(ValueError, match="indexer_topk"):
            indexer_topk(*bad)
    with pytest.raises(ValueError, match="but the tensors hold"):
        indexer_topk(q[:, :4], k, w[:, :4], 3, cu_seqlens=[0, 4, 8])
    with pytest.raises(ValueError, match="fit into topk"):
        indexer_topk(q, k, w, 3, num_first=2, num_local=2)
    q, k, v = tensors((2, 8, 4, 8), (2, 8, 2, 8), (2, 8, 2, 8))
    index = torch.zeros(2, 8, 3, dtype=torch.int64)
    for bad in ((q, k[:, :, :1], v, index), (q[:, :, :3], k, v, index), (q, k, v, index[:, :4]),
                (q, k, v, index.float()), (q, k[..., :4], v, index)):
        with pytest.raises(ValueError, match="sparse_attention"):
            sparse_attention(*bad)
