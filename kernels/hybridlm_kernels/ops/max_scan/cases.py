"""Cases of the scan of falling maxima for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.max_scan import max_scan


def _check() -> Inputs:
    return {"x": torch.randn(2, 70, 24, dtype=torch.float64), "g": -torch.rand(2, 70, 24, dtype=torch.float64)}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    size = (s.B, s.T, s.model_dim)
    return {"x": torch.randn(*size, dtype=dtype, device=device), "g": -torch.rand(*size, device=device)}


CASES: list[OperationCases] = [(
    [CheckCase("max_scan", "real", max_scan, _check, fixed=("x", "g"), causal=True)],
    [BenchCase("real", max_scan, _bench, lambda s: 2.0 * s.tokens * s.model_dim)])]
