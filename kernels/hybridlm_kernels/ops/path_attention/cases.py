"""Cases of PaTH attention for the doctor, the tests and the benchmark."""

import torch
import torch.nn.functional as F

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.path_attention import path_attention
from hybridlm_kernels.random_inputs import bench_inputs


def _check() -> Inputs:
    inputs = randn(q=(1, 100, 2, 8), k=(1, 100, 1, 8), v=(1, 100, 1, 8))
    w = F.normalize(torch.randn(1, 100, 1, 8, dtype=torch.float64), dim=-1)
    return {**inputs, "w": w, "beta": 2.0 * torch.rand(1, 100, 1, dtype=torch.float64)}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    w = F.normalize(torch.randn(s.B, s.T, s.H, s.D, device=device), dim=-1).to(dtype)
    return {**bench_inputs("none")(s, dtype, device), "w": w, "beta": torch.rand(s.B, s.T, s.H, device=device)}


CASES: list[OperationCases] = [(
    [CheckCase("path_attention", "grouped heads", path_attention, _check, causal=True)],
    [BenchCase("causal", path_attention, _bench, lambda s: 2.0 * s.tokens * s.T * s.H * s.D,
               ("q", "k", "v", "w", "beta"))])]
