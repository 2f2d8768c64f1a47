"""Attention of each query to a range of keys."""

from itertools import pairwise

import pytest
import torch

from hybridlm_kernels import range_attention
from hybridlm_kernels.ops.range_attention import ranges as pieces
from tests.support.kernel_compare import LargestTensor, assert_same_function, tensors


def ranges(batch, length, stride, window, documents=((0, 1.0),)):
    """The complete windows that each token of packed documents sees; documents are (start, ...) parts of a row."""
    first_BT, count_BT = torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, length, dtype=torch.long)
    starts = [start for start, *_ in documents] + [length]
    for before, (start, stop) in enumerate(pairwise(starts)):
        if before:
            first_BT[:, start:] = int(first_BT[0, start - 1] + count_BT[0, start - 1])
        complete = (torch.arange(stop - start) + 1 - window).div(stride, rounding_mode="floor") + 1
        count_BT[:, start:stop] = complete.clamp(min=0)
    return first_BT, count_BT, int((first_BT + count_BT).max())


def both(out):
    """Output and log sums as one tensor; log sums of nothing count as 0."""
    o, lse = out
    return torch.cat([o, torch.where(lse == -torch.inf, 0.0, lse)[..., None].to(o.dtype)], -1)


CASES = [(1, 1, 1, 1, ((0,),)), (2, 40, 4, 8, ((0,),)), (2, 61, 3, 5, ((0,), (7,), (9,), (40,)))]


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6),
                                                  (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, dtype, tolerance, heads, groups, monkeypatch):
    monkeypatch.setattr(pieces, "CPU_PIECE_ELEMENTS", 512)
    batch, length = case[:2]
    first, count, entries = ranges(*case)
    inputs = tensors((batch, length, heads, 8), (batch, entries, groups, 8), (batch, entries, groups, 5), dtype=dtype)
    assert_same_function(lambda backend: both(range_attention(*inputs, first, count, scale=0.3, backend=backend)),
                         inputs, tolerance)


def test_reference_is_softmax_over_the_range():
    q, k, v = (x.detach() for x in tensors((1, 3, 1, 4), (1, 5, 1, 4), (1, 5, 1, 2)))
    o, lse = range_attention(q, k, v, torch.tensor([[0, 1, 2]]), torch.tensor([[0, 2, 3]]), scale=0.5,
                             backend="reference")
    for t, keys in ((1, slice(1, 3)), (2, slice(2, 5))):
        score = 0.5 * k[0, keys, 0] @ q[0, t, 0]
        torch.testing.assert_close(o[0, t, 0], score.exp() @ v[0, keys, 0] / score.exp().sum())
        torch.testing.assert_close(lse[0, t, 0], score.exp().sum().log())
    assert o[0, 0].eq(0).all()
    assert lse[0, 0].item() == -torch.inf


def test_no_tensor_of_all_scores(monkeypatch):
    monkeypatch.setattr(pieces, "CPU_PIECE_ELEMENTS", 2**14)
    first, count, entries = ranges(1, 512, 4, 8)
    q, k, v = tensors((1, 512, 4, 8), (1, entries, 1, 8), (1, entries, 1, 8), dtype=torch.float32)
    with LargestTensor() as largest:
        o, lse = range_attention(q, k, v, first, count)
        (o.sum() + lse.where(lse > -torch.inf, 0).sum()).backward()
    assert largest.numel <= 2**15


def test_bad_arguments():
    q, k = torch.zeros(1, 3, 4, 8), torch.zeros(1, 5, 2, 8)
    whole = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"range_attention: q, k and v must be"):
        range_attention(q, k, k[:, :4], whole, whole)
    with pytest.raises(ValueError, match="a multiple of the key heads"):
        range_attention(q[:, :, :3], k, k, whole, whole)
    with pytest.raises(ValueError, match=r"count must be \[1, 3\]; got \[1, 5\]"):
        range_attention(q, k, k, whole, torch.zeros(1, 5))
