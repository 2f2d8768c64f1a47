"""Cases of position-weighted means for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.position_weighted_mean import position_weighted_mean


def _check() -> Inputs:
    k, v = torch.randn(2, 2, 40, 6, dtype=torch.float64)
    left, right = torch.randn(2, 40, 3, dtype=torch.float64)
    return {"k": k, "v": v, "left": left, "right": right}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    k, v = torch.randn(2, s.B, s.T, s.model_dim, dtype=dtype, device=device)
    left, right = 0.1 * torch.randn(2, s.T, 128, device=device)
    return {"k": k, "v": v, "left": left, "right": right}


CASES: list[OperationCases] = [(
    [CheckCase("position_weighted_mean", "window", position_weighted_mean, _check, {"window": 9})],
    [BenchCase("all positions", position_weighted_mean, _bench, lambda s: 2.0 * s.tokens * s.T * s.model_dim,
               ("k", "v", "left", "right"))])]
