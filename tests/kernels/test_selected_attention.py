"""Attention over listed tokens and blocks, a window, sinks and biases, against the dense definition."""

import itertools

import pytest
import torch

from hybridlm_kernels import attention, selected_attention
from hybridlm_kernels.ops.selected_attention import listed_parts, torch_backend
from hybridlm_kernels.ops.selected_attention.cases import random_blocks
from tests.kernels.test_sparse_attention import borders
from tests.support.kernel_compare import LargestTensor, error, tensors

HEADS = [(1, 2, 4), (2, 2, 4), (4, 2, 4), (1, 1, 3)]  # lists, key heads, query heads


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces, tiles and bands so small that every test has several, the last ones not full."""
    monkeypatch.setattr(torch_backend, "CPU_PIECE_ELEMENTS", 150)
    monkeypatch.setattr(torch_backend, "CPU_SLOT_ELEMENTS", 150)
    monkeypatch.setattr(listed_parts, "CPU_SCORES", 50)
    monkeypatch.setattr(torch_backend, "MIN_QUERIES", 3)
    monkeypatch.setattr(listed_parts, "TILE_ROWS", 6)
    monkeypatch.setattr(listed_parts, "MIN_BAND", 4)


def case(heads, queries, keys, block, own_window, sinks, bias, seed):
    """Tensors of one call: queries, keys, values and options; lists in random order with holes, the first empty."""
    lists, groups, query_heads = heads
    shapes = [(2, queries, query_heads, 6), (2, keys, groups, 6), (2, keys, groups, 5)]
    names = []
    units = -(-keys // (block or 1))
    index = torch.rand(2, queries, lists, units, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :4]
    index = index.masked_fill(torch.rand(index.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.3, -1)
    index[:, 0] = -1
    if own_window:
        names += ["window_k_BWGK", "window_v_BWGV"]
        shapes += [(2, keys, groups, 6), (2, keys, groups, 5)]
    if sinks:
        names.append("sinks_H")
        shapes.append((query_heads,))
    if bias:
        names.append("bias_BTUN")
        shapes.append(tuple(index.shape))
    made = tensors(*shapes, seed=seed)
    return made, index, dict(zip(names, made[3:], strict=True))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("block", [None, 1, 4])
def test_it_equals_the_definition(heads, block, small_pieces):
    """Outputs, log sums and gradients, with windows, sinks, biases, packed documents and the last queries of rows."""
    options = itertools.product([(None, False), (1, False), (5, False), (5, True)], [False, True], [False, True],
                                ["packed", "rows", "last queries"])
    turn = HEADS.index(heads) + (block or 0)
    for seed, ((window, own), sinks, bias, how) in enumerate(options):
        if (seed + seed // 4 + turn) % 4:  # each combination with some heads and some block
            continue
        queries, keys = (3, 19) if how == "last queries" else (23, 23)
        made, index, extra = case(heads, queries, keys, block, own, sinks, bias, seed)
        cuts = [0, 1, 9, 23, 30, 46] if how == "packed" else None
        found = {}
        for backend in ("torch", "reference"):
            o, lse = selected_attention(*made[:3], index, block=block, window=window, cu_seqlens=cuts, scale=0.7,
                                        backend=backend, **extra)
            loss = (o * torch.arange(1, 6)).sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).cos().sum()
            found[backend] = [o, lse, *torch.autograd.grad(loss, made)]
        for a, b in zip(found["torch"], found["reference"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
def test_all_blocks_are_dense_attention(packed):
    q, k, v = tensors((2, 60, 4, 16), (2, 60, 2, 16), (2, 60, 2, 8))
    cuts = borders(2, 60) if packed else None
    everything = torch.arange(8).expand(2, 60, 2, 8)
    sparse, dense = selected_attention(q, k, v, everything, block=8, cu_seqlens=cuts)[0], attention(
        q, k, v, cu_seqlens=cuts)
    upstream = torch.randn_like(dense)
    pairs = zip((sparse, *torch.autograd.grad(sparse, (q, k, v), upstream)),
                (dense, *torch.autograd.grad(dense, (q, k, v), upstream)), strict=True)
    assert max(error(a, b) for a, b in pairs) < 1e-12


def test_a_window_alone_is_window_attention_with_sinks():
    q, k, v, sinks = tensors((1, 90, 4, 16), (1, 90, 2, 16), (1, 90, 2, 8), (4,))
    nothing = torch.full((1, 90, 1, 0), -1)
    o, _ = selected_attention(q, k, v, nothing, window=17, sinks_H=sinks)
    torch.testing.assert_close(o, attention(q, k, v, window=17, sinks_H=sinks))


@pytest.mark.parametrize("head_dim", [8, 12])
def test_later_tokens_change_no_bit(head_dim):
    q, k, v = (x.detach() for x in tensors((1, 130, 6, head_dim), (1, 130, 2, head_dim), (1, 130, 2, head_dim),
                                           dtype=torch.float32))
    index = random_blocks(1, 130, 2, 8, 4)
    o, lse = selected_attention(q, k, v, index, block=8, window=9)
    for cut in (1, 31, 64, 129):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, cut:] = torch.randn_like(x[:, cut:])
        lists = torch.cat([index[:, :cut], random_blocks(1, 130, 2, 8, 4)[:, cut:]], 1)
        changed, changed_lse = selected_attention(*others, lists, block=8, window=9)
        assert torch.equal(changed[:, :cut], o[:, :cut])
        assert torch.equal(changed_lse[:, :cut], lse[:, :cut])


def test_half_precision_computes_in_fp32():
    inputs = tensors((1, 50, 4, 16), (1, 50, 2, 16), (1, 50, 2, 16), dtype=torch.bfloat16)
    index = random_blocks(1, 50, 2, 8, 3)
    found = []
    for backend in ("torch", "reference"):
        o, lse = selected_attention(*inputs, index, block=8, backend=backend)
        assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        found.append([o, lse, *torch.autograd.grad(o.float().square().sum() + lse.sum(), inputs)])
    assert max(error(a, b) for a, b in zip(*found, strict=True)) < 3e-3


def test_memory_grows_with_the_length_not_with_its_square():
    def largest(length):
        q, k, v = tensors((1, length, 2, 4), (1, length, 2, 4), (1, length, 2, 4), dtype=torch.float32)
        with LargestTensor() as seen:
            selected_attention(q, k, v, random_blocks(1, 64, 2, 8, 4).repeat(1, length // 64, 1, 1), block=8,
                               window=16)[0].sum().backward()
        return seen.numel

    assert largest(3200) <= 2.1 * largest(1600) < 1600 * 1600 // 4


def test_bad_arguments():
    q, k, v = tensors((2, 8, 4, 8), (2, 8, 2, 8), (2, 8, 2, 8))
    index = torch.zeros(2, 8, 2, 3, dtype=torch.int64)
    for args, options in [((q, k[:, :, :1], v, index), {}), ((q[:, :, :3], k, v, index), {}),
                          ((q, k, v, index[:, :4]), {}), ((q, k, v, index.float()), {}),
                          ((q, k, v, index[:, :, 0]), {}),
                          ((q, k, v, index.repeat(1, 1, 3, 1)), {}), ((q, k, v, index), {"block": 0}),
                          ((q, k, v, index), {"window": 0}), ((q, k, v, index), {"sinks_H": torch.zeros(3)}),
                          ((q, k, v, index), {"bias_BTUN": torch.zeros(2, 8, 2, 2)}),
                          ((q, k, v, index), {"window_k_BWGK": k}),
                          ((q, k, v, index), {"window": 2, "window_k_BWGK": k, "window_v_BWGV": v[:, :4]}),
                          ((q, k[:, :4], v[:, :4], index), {"block": 2})]:
        with pytest.raises(ValueError, match="selected_attention"):
            selected_attention(*args, **options)
