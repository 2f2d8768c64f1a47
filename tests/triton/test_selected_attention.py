"""The Triton kernels of attention over listed blocks and a window against the fp64 reference, in fp32."""

import pytest
import torch

from hybridlm_kernels import attention, selected_attention
from hybridlm_kernels.ops.selected_attention import triton_forward, triton_gradients
from hybridlm_kernels.ops.selected_attention.cases import random_blocks
from tests.kernels.test_selected_attention import case
from tests.support.kernel_compare import error, tensors

TOLERANCE = 3e-6


@pytest.fixture
def short_pieces(monkeypatch):
    """Several pieces of queries and segments of blocks in every test, the last ones not full."""
    monkeypatch.setattr(triton_forward, "WORK_BUFFER_BYTES", 0)
    monkeypatch.setattr(triton_gradients, "SEGMENT_ROWS", 1)


def results(made, index, extra, backend, **options):
    """The output, the log sums and every gradient, of a loss on both outputs."""
    o, lse = selected_attention(*made[:3], index, backend=backend, **options, **extra)
    loss = (o * torch.arange(1, o.shape[3] + 1).to(o)).sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).cos().sum()
    return [x.detach() for x in (o, lse, *torch.autograd.grad(loss, made))]


def compare(made, index, extra, device, **options):
    """Equal to the reference, which gets the numbers that fp32 holds; returns what the kernels computed."""
    single = [x.detach().float().to(device).requires_grad_() for x in made]
    double = [x.detach().cpu().double().requires_grad_() for x in single]
    names = list(extra)
    expected = results(double, index, dict(zip(names, double[3:], strict=True)), "reference", **options)
    found = results(single, index.to(device), dict(zip(names, single[3:], strict=True)), "triton", **options)
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv", *names), found, expected, strict=True):
        a = a.cpu()
        assert torch.equal(a.isinf(), b.isinf()), name
        assert error(a.nan_to_num(neginf=0.0), b.nan_to_num(neginf=0.0)) <= TOLERANCE, (name, options)
    return found


# lists, key heads, query heads; block; window and whether it has its own keys; sinks; bias; borders
CALLS = [((1, 2, 4), 4, None, False, False, False, "packed"), ((4, 2, 4), 7, 5, False, True, True, "packed"),
         ((2, 2, 4), 4, 5, True, False, True, "packed"), ((1, 1, 3), 4, 1, False, True, False, "rows"),
         ((2, 2, 4), 7, 5, False, False, True, "last queries"), ((4, 2, 4), 1, 5, True, True, False, "last queries"),
         ((1, 2, 4), 4, 70, False, True, True, "last queries")]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_equals_reference(call, device, short_pieces):
    """Lists with holes and empty ones, documents shorter than a block, the last queries of rows."""
    heads, block, window, own, sinks, bias, how = call
    queries, keys = (3, 19) if how == "last queries" else (13, 13)
    made, index, extra = case(heads, queries, keys, block, own, sinks, bias, CALLS.index(call))
    cuts = [0, 1, 9, 13, 20, 26] if how == "packed" else None
    compare(made, index, extra, device, block=block, window=window, cu_seqlens=cuts, scale=0.7)


def test_a_budget_that_covers_the_documents_is_dense_attention(device):
    q, k, v = (x.detach().float().to(device) for x in tensors((2, 20, 4, 16), (2, 20, 2, 16), (2, 20, 2, 8)))
    cuts = [0, 3, 20, 40]
    everything = torch.arange(3, device=device).expand(2, 20, 2, 3)
    o, _ = selected_attention(q, k, v, everything, block=8, cu_seqlens=cuts, backend="triton")
    assert error(o.cpu(), attention(q, k, v, cu_seqlens=cuts).cpu().double()) <= TOLERANCE


def test_more_query_heads_than_a_tile_has_rows(device):
    made = tensors((1, 9, 35, 8), (1, 9, 1, 8), (1, 9, 1, 8))
    compare(made, random_blocks(1, 9, 1, 4, 2), {}, device, block=4)


def test_a_window_longer_than_its_least_block(device):
    """Two blocks of 128 keys, whose tiles of keys are read only where a query sees them."""
    made = tensors((1, 40, 1, 8), (1, 200, 1, 8), (1, 200, 1, 8))
    nothing = torch.full((1, 40, 1, 0), -1)
    compare(made, nothing, {}, device, window=100)


def test_tiles_of_half_precision(device):
    """Tiles of 64 rows; the reference gets the numbers that fp16 holds."""
    made = [x.detach().half().requires_grad_() for x in tensors((1, 40, 16, 16), (1, 90, 1, 16), (1, 90, 1, 16))]
    index = random_blocks(1, 90, 1, 32, 2)[:, -40:]
    expected = results([x.detach().double().requires_grad_() for x in made], index, {}, "reference", block=32)
    single = [x.detach().to(device).requires_grad_() for x in made]
    found = results(single, index.to(device), {}, "triton", block=32)
    assert [x.dtype for x in found] == [torch.float16, torch.float32, *[torch.float16] * 3]
    assert all(error(a.cpu(), b) <= 2e-3 for a, b in zip(found, expected, strict=True))


def test_later_tokens_change_no_bit(device, short_pieces):
    q, k, v = (x.detach().float().to(device) for x in tensors((1, 40, 3, 8), (1, 40, 1, 8), (1, 40, 1, 8)))
    index = random_blocks(1, 40, 1, 8, 3).to(device)
    before = selected_attention(q, k, v, index, block=8, window=5, backend="triton")
    for cut in (1, 23):
        others = [torch.cat([x[:, :cut], x[:, cut:] - 1.0], 1) for x in (q, k, v)]
        lists = torch.cat([index[:, :cut], random_blocks(1, 40, 1, 8, 3).to(device)[:, cut:]], 1)
        after = selected_attention(*others, lists, block=8, window=5, backend="triton")
        assert all(torch.equal(a[:, :cut], b[:, :cut]) for a, b in zip(before, after, strict=True))
        assert not torch.equal(before[0][:, cut:], after[0][:, cut:])


def test_nothing_to_read(device):
    shapes = (1, 3, 2, 8), (1, 3, 1, 8), (1, 3, 1, 8)
    q, k, v = (x.detach().float().to(device).requires_grad_() for x in tensors(*shapes))
    for lists, block in ((torch.full((1, 3, 1, 2), -1), 2), (torch.full((1, 3, 1, 0), -1), None)):
        o, lse = selected_attention(q, k, v, lists.to(device), block=block, backend="triton")
        assert not o.any()
        assert torch.equal(lse, torch.full_like(lse, -torch.inf))
        assert not any(grad.any() for grad in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize(("dim", "block", "reason"), [(257, 2, "heads of up to 256 dims"),
                                                      (8, None, "lists of tokens")])
def test_what_it_refuses(dim, block, reason, device):
    q = torch.zeros(1, 2, 1, dim, device=device)
    with pytest.raises(RuntimeError, match=reason):
        selected_attention(q, q, q, torch.zeros(1, 2, 1, 1, dtype=torch.int64, device=device), block=block,
                           backend="triton")
