"""The selection of the Triton backend is that of the reference, ties and padding included."""

import pytest
import torch

from hybridlm_kernels import indexer_topk
from hybridlm_kernels.ops.sparse_attention import triton_index


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    monkeypatch.setattr(triton_index, "MIN_BLOCK_QUERIES", 8)
    monkeypatch.setattr(triton_index, "STRIP_ELEMENTS", 200)


def case(device, batch, queries, keys, heads, dim, whole_numbers):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, queries, heads, dim), (batch, keys, dim), (batch, queries, heads))
    inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return [x.round() for x in inputs] if whole_numbers else inputs


# rows, queries, keys, heads, dim, topk, whole numbers (these tie at every level), borders
CASES = [(1, 1, 1, 1, 4, 3, False, None), (1, 11, 11, 3, 20, 4, False, None), (1, 11, 11, 2, 4, 5, True, None),
         (2, 3, 70, 1, 2, 7, True, None), (1, 2, 5, 4, 8, 9, False, None),
         (2, 7, 7, 2, 4, 3, True, [0, 1, 7, 8, 10, 14]), (2, 3, 9, 2, 4, 3, True, [0, 4, 9, 10, 18])]


@pytest.mark.parametrize("shape", CASES)
def test_selection(shape, device):
    *sizes, topk, whole_numbers, borders = shape
    inputs = case(device, *sizes, whole_numbers)
    got, expected = (indexer_topk(*inputs, topk, cu_seqlens=borders, backend=b) for b in ("triton", "reference"))
    assert got.dtype == torch.int32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("borders", [None, [0, 1, 5, 13]])
def test_first_and_local_keys_are_always_selected(borders, device):
    inputs = case(device, 1, 13, 13, 2, 4, True)
    options = {"num_first": 1, "num_local": 2, "cu_seqlens": borders}
    assert torch.equal(indexer_topk(*inputs, 5, **options, backend="triton"),
                       indexer_topk(*inputs, 5, **options, backend="reference"))


def test_negative_zero_ties_with_zero(device):
    q, k = torch.ones(1, 9, 1, 2, device=device), -torch.ones(1, 9, 2, device=device)
    index = indexer_topk(q, k, -torch.ones(1, 9, 1, device=device), 2, backend="triton")
    assert index[0, 1:].tolist() == [[0, 1]] * 8
    assert index[0, 0].tolist() == [0, -1]


def test_the_work_buffer_grows_with_the_keys_alone():
    sizes = [triton_index.Strips(1, n, n, None, torch.device("cpu")).buffer().numel() for n in (1600, 3200)]
    assert sizes[1] == 2 * sizes[0]
