"""Projections of overlapping windows, and sums of gated branches: their formulas, gradients, and memory."""

import pytest
import torch

from hybridlm.model.mixers.common.compression import Compressor
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.gated_sum import CPU_PIECE_ELEMENTS, gated_sum
from hybridlm.model.mixers.common.window_projection import project_windows
from hybridlm.model.sequence import SequenceInfo


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


@pytest.mark.parametrize(("length", "stride", "tokens"), [(4, 2, 11), (6, 2, 6), (3, 3, 8)])
def test_projection_and_gradients(length, stride, tokens):
    x, weight, places = randn(2, tokens, 3, 2), randn(3, 2 * length, 2), randn(length, 3, 2)
    found = project_windows(x, weight, places, stride)
    for window in range((tokens - length) // stride + 1):
        own = x[:, window * stride : window * stride + length] + places
        expected = torch.einsum("blgk,glkj->bgj", own, weight.view(3, length, 2, 2))
        torch.testing.assert_close(found[:, window], expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *inputs: project_windows(*inputs, stride), (x, weight, places))
    assert torch.autograd.gradcheck(lambda *inputs: project_windows(*inputs, None, stride), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_compressed_like_their_windows_without_keeping_these(dtype):
    compressor = Compressor("linear", 4, 2, 8)
    compressor.init_weights(0.3)
    torch.nn.init.normal_(compressor.places)
    k, v = randn(2, 21, 2, 8).detach().to(dtype).requires_grad_(), randn(2, 21, 2, 8).detach().to(dtype)
    windows = EntryWindows.of(SequenceInfo.make(2, 21, torch.device("cpu")), k, 21, 4, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        found = compressor((k, v), windows)
    assert max(kept) <= max(x.numel() for x in (k, *compressor.parameters()))
    wide = k.detach().float().requires_grad_()
    expected = compressor(windows.gather(torch.stack([wide, v.float()], 2))).unbind(2)
    count = int(windows.count_BT.max())
    upstream = randn(2, count, 2, 8).detach().to(dtype)
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-5}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours[:, :count].float(), theirs[:, :count], **tolerance)
    weights = tuple(compressor.parameters())
    ours, theirs = (torch.autograd.grad(sum((x[:, :count] * upstream).float().sum() for x in pair), (key, *weights))
                    for pair, key in ((found, k), (expected, wide)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, **tolerance)


def test_gated_sum_and_gradients():
    gates, branches = randn(2, 5, 3, 2), [randn(2, 5, 3, 4), randn(2, 3, 5, 4).transpose(1, 2)]
    expected = (gates[..., None] * torch.stack(branches, 3)).sum(3)
    torch.testing.assert_close(gated_sum(gates, branches), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda gates, *branches: gated_sum(gates, branches), (gates, *branches))


def test_gated_sum_of_several_pieces_and_of_several_dtypes():
    tokens = 2 * CPU_PIECE_ELEMENTS // 8 + 3
    gates, branches = randn(1, tokens, 1, 3, dtype=torch.float32), [randn(1, tokens, 1, 8, dtype=torch.float32)] * 3
    plain = sum(gates[..., i, None] * x for i, x in enumerate(branches))
    assert torch.equal(gated_sum(gates, branches), plain)
    assert gated_sum(gates, [x.bfloat16() for x in branches]).dtype == torch.float32
