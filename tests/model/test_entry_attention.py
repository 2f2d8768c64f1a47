"""Attention to entries against its formula: outputs, log sums and gradients, in pieces that documents cut."""

import pytest
import torch

from hybridlm.model.mixers.common import entry_attention as subject
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.overlap import reduce_to_blocks
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import range_attention
from hybridlm_kernels.ops.range_attention import ranges
from hybridlm_kernels.packing import CuSeqlens

SCALE = 0.4
BORDERS = {"packed": [0, 3, 20, 21, 40, 80], "separate": None, "short": [0, 2, 40, 43, 80]}


def make(name, dtype=torch.float64, rows=2, length=40):
    """Queries, keys and values of two rows of 40 tokens, and their windows of 4 tokens every 2."""
    borders = BORDERS[name]
    seq = SequenceInfo.make(rows, length, torch.device("cpu"), None if borders is None else CuSeqlens(borders))
    generator = torch.Generator().manual_seed(3)
    q_BTHK = torch.randn(rows, length, 6, 5, generator=generator, dtype=torch.float64)
    windows = EntryWindows.of(seq, q_BTHK, length, 4, 2)
    k_BEGK = torch.randn(rows, windows.number, 2, 5, generator=generator, dtype=torch.float64)
    v_BEGV = torch.randn(rows, windows.number, 2, 3, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q_BTHK, k_BEGK, v_BEGV)], windows


def formula(tensors, windows):
    return range_attention(*tensors, windows.first_BT, windows.count_BT, scale=SCALE, backend="reference")


def gradients(found, tensors):
    """Gradients of a sum that depends on outputs, and on log sums where there are any."""
    o, lse = found
    return torch.autograd.grad(o.sin().sum() + lse[lse > -torch.inf].cos().sum(), tensors)


@pytest.fixture(params=[8, 64])
def queries_per_piece(request, monkeypatch):
    monkeypatch.setattr(ranges, "CPU_PIECE_ELEMENTS", request.param * 2 * 6 * 20)


@pytest.mark.parametrize("name", BORDERS)
def test_outputs_log_sums_and_gradients_are_those_of_the_formula(name, queries_per_piece):
    tensors, windows = make(name)
    expected, found = formula(tensors, windows), subject.entry_attention(*tensors, windows, SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert bool((found[1] == -torch.inf).any()), "no query without an entry"
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", BORDERS)
def test_pieces_of_other_devices_give_the_same(name, queries_per_piece, monkeypatch):
    tensors, windows = make(name)
    found = subject.entry_attention(*tensors, windows, SCALE)
    monkeypatch.setattr(ranges.Ranges, "exact", lambda self: False)
    monkeypatch.setattr(ranges, "GPU_PIECE_ELEMENTS", ranges.CPU_PIECE_ELEMENTS)
    again = subject.entry_attention(*tensors, windows, SCALE)
    torch.testing.assert_close(again, found, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(again, tensors), gradients(found, tensors), rtol=1e-11, atol=1e-12)


def test_gradients_are_those_of_differences():
    tensors, _ = make("packed")
    windows = EntryWindows.of(SequenceInfo.make(1, 8, torch.device("cpu"), CuSeqlens([0, 2, 8])), tensors[0][:1, :8], 8,
                              4, 2)
    sizes = (8, windows.number, windows.number)
    short = [x.detach()[:1, :size].clone().requires_grad_() for x, size in zip(tensors, sizes, strict=True)]

    def run(*inputs):
        o, lse = subject.entry_attention(*inputs, windows, SCALE)
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, short)


def test_weights_are_those_of_the_outputs(queries_per_piece):
    (q, k, _), windows = make("packed")
    rows = slice(7, 39)
    each_BEGE = torch.eye(windows.number, dtype=q.dtype)[None, :, None].expand(2, -1, 2, -1)  # values that name entries
    p_BTHE, _ = subject.entry_attention(q, k, each_BEGE, windows, SCALE)
    expected = p_BTHE[:, rows].unflatten(2, (2, -1)).sum(3)
    torch.testing.assert_close(subject.entry_weights(q, k, windows, rows, SCALE), expected, rtol=1e-12, atol=1e-12)


def test_bf16_is_computed_in_fp32():
    tensors, windows = make("packed", torch.bfloat16)
    found = subject.entry_attention(*tensors, windows, SCALE)
    assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, torch.float32)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = formula(wide, windows)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=2**-8, atol=1e-5)
    o, lse = gradients((found[0].float(), found[1]), tensors), gradients(expected, wide)
    for ours, theirs in zip(o, lse, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_blocks_of_one_document_and_of_packed_ones_add_windows_in_one_order(reduce):
    generator = torch.Generator().manual_seed(1)
    whole = SequenceInfo.make(1, 40, torch.device("cpu"))
    packed = SequenceInfo.make(1, 52, torch.device("cpu"), CuSeqlens([0, 12, 52]))
    weight = torch.rand(1, 40, 1, 20, generator=generator)

    def blocks_of(seq, length, weight):
        windows, blocks = (EntryWindows.of(seq, torch.zeros(1, length, 1), length, *size) for size in ((4, 2), (8, 8)))
        weight = weight * windows.visible(slice(length - 40, length))[:, :, None]
        found = reduce_to_blocks(weight, windows, blocks, slice(length - 40, length), reduce)
        return found * blocks.visible(slice(length - 40, length))[:, :, None]

    alone = blocks_of(whole, 40, weight)
    last = torch.zeros(1, 40, 1, 1)
    # The first document has 5 windows and 1 block.
    behind = blocks_of(packed, 52, torch.cat([torch.rand(1, 40, 1, 5, generator=generator), weight, last], -1))
    assert torch.equal(alone[..., :4], behind[..., 1:5])
    assert bool(alone.any())
