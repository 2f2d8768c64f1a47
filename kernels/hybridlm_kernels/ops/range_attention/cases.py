"""Cases of attention to ranges of keys for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.range_attention import range_attention

STRIDE, LENGTH = 16, 32  # tokens of an entry, as published for native sparse attention
GROUP = 16  # query heads of a key head


def _complete(tokens: int, stride: int, length: int) -> torch.Tensor:
    """Number of complete windows before the end of each token."""
    return ((torch.arange(tokens) + 1 - length).div(stride, rounding_mode="floor") + 1).clamp(min=0)


def _check() -> Inputs:
    count_BT = _complete(70, 4, 8).clamp(min=1).expand(2, -1)  # log sums of nothing are -inf, which compares as NaN
    return {**randn(q=(2, 70, 4, 16), k=(2, 16, 2, 16), v=(2, 16, 2, 24)), "first": torch.zeros_like(count_BT),
            "count": count_BT}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    groups, entries = max(1, s.H // GROUP), max(1, s.T // STRIDE)
    count_BT = _complete(s.T, STRIDE, LENGTH).expand(s.B, -1).contiguous().to(device)
    sizes = (s.T, s.H), (entries, groups), (entries, groups)
    q, k, v = (torch.randn(s.B, *size, s.D, dtype=dtype, device=device) for size in sizes)
    return {"q": q, "k": k, "v": v, "first": torch.zeros_like(count_BT), "count": count_BT}


CASES: list[OperationCases] = [(
    [CheckCase("range_attention", "entries of complete windows", range_attention, _check)],
    [BenchCase("entries of 16 tokens", range_attention, _bench, lambda s: 2.0 * s.tokens * s.T / STRIDE * s.H * s.D,
               ("q", "k", "v"))])]
