"""The indexer's loss, its gradients and the recall of a selection on the Triton backend."""

import pytest
import torch

from hybridlm_kernels import indexer_kl
from hybridlm_kernels.ops.indexer_kl import reference
from hybridlm_kernels.ops.sparse_attention import triton_index, triton_inverse
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.registry import KernelUnavailable
from tests.support.kernel_compare import error, tensors

# rows, queries, keys, index heads, index dim, heads, key heads, key dim
SHAPES = [(2, 4, 4, 3, 20, 4, 2, 8), (1, 2, 70, 2, 8, 3, 1, 40)]


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    monkeypatch.setattr(triton_index, "MIN_BLOCK_QUERIES", 3)
    monkeypatch.setattr(triton_index, "STRIP_ELEMENTS", 1)
    monkeypatch.setattr(triton_inverse, "WORK_BUFFER_BYTES", 1)
    monkeypatch.setattr(triton_inverse, "MIN_BLOCK_QUERIES", 2)


def case(batch, queries, keys, heads, dim, main_heads, groups, main_dim):
    return tensors((batch, queries, heads, dim), (batch, keys, dim), (batch, queries, heads),
                   (batch, queries, main_heads, main_dim), (batch, keys, groups, main_dim))


def listing(batch, queries, keys, count, borders=None):
    """Distinct visible keys in random order with holes; the second query has none."""
    cu_seqlens = None if borders is None else CuSeqlens(borders)
    mask = reference.support(queries, keys, batch, None, cu_seqlens, torch.device("cpu"))
    score = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~mask, -1.0)
    top = score.topk(min(count, keys), -1)
    index = top.indices.masked_fill(top.values < 0.2, -1)
    index[:, 1:2] = -1
    return index.int()


def compare(inputs, device, indices=None, recall_of=None, **options):
    """fp32 on Triton against fp64 on the reference: loss, entropy, recall, gradients."""
    def run(inputs, device, backend):
        lists = {"indices_BTN": indices, "recall_of_BTN": recall_of}
        lists = {name: None if x is None else x.to(device) for name, x in lists.items()}
        result = indexer_kl(*inputs, **lists, **options, backend=backend)
        return result, torch.autograd.grad(result.loss * 3.0, inputs[:3])

    narrow = [x.detach().float().to(device).requires_grad_() for x in inputs]
    result, grads = run(narrow, device, "triton")
    expected, expected_grads = run([x.detach().cpu().double().requires_grad_() for x in narrow], "cpu", "reference")
    numbers = zip((*result[:2], *(result.recall or ())), (*expected[:2], *(expected.recall or ())), strict=True)
    for got, wanted in numbers:
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert all(error(a.cpu(), b) <= 1e-5 for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_keys(shape, device):
    compare(case(*shape), device, scale=0.7)


@pytest.mark.parametrize("shape", SHAPES)
def test_listed_keys(shape, device):
    compare(case(*shape), device, listing(*shape[:3], 9), scale=0.7)


@pytest.mark.parametrize("queries", [5, 2])
def test_packed_documents_and_recall(queries, device):
    borders = [0, 1, 5, 7, 10]
    compare(case(2, queries, 5, 2, 4, 2, 1, 8), device, recall_of=listing(2, queries, 5, 2, borders),
            cu_seqlens=borders)


def test_no_gradient_where_none_is_wanted(device):
    inputs = [x.detach().float().to(device) for x in case(*SHAPES[0])]
    assert not indexer_kl(*inputs, backend="triton").loss.requires_grad


def test_the_same_bits_every_time(device):
    inputs = [x.detach().float().to(device).requires_grad_() for x in case(1, 4, 4, 2, 8, 2, 1, 8)]
    index = listing(1, 4, 4, 3).to(device)
    for lists in (None, index):
        first, second = (torch.autograd.grad(indexer_kl(*inputs, indices_BTN=lists, backend="triton").loss, inputs[:3])
                         for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_it_cannot_hold_is_refused_with_the_reason(device):
    wide = [x.detach().float().to(device) for x in case(1, 1, 1, 1, 4, 1, 1, 600)]
    with pytest.raises(KernelUnavailable, match="heads of up to 320 dims"):
        indexer_kl(*wide, backend="triton")
    half = [x.detach().half().to(device) for x in case(1, 1, 1, 1, 4, 1, 1, 4)]
    with pytest.raises(KernelUnavailable, match="too small for float16"):
        indexer_kl(*half, backend="triton")
