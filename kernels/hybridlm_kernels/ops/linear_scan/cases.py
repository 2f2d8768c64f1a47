"""Cases of the linear scan for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.linear_scan import linear_scan


def _check() -> Inputs:
    return {"x": torch.randn(2, 70, 24, dtype=torch.float64), "a": torch.rand(2, 70, 24, dtype=torch.float64)}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    size = (s.B, s.T, s.model_dim)
    return {"x": torch.randn(*size, dtype=dtype, device=device), "a": torch.rand(*size, device=device)}


CASES: list[OperationCases] = [(
    [CheckCase("linear_scan", "real", linear_scan, _check, causal=True)],
    [BenchCase("real", linear_scan, _bench, lambda s: 2.0 * s.tokens * s.model_dim, ("x", "a"))])]
