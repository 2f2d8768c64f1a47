"""Cases of forgetting attention for the doctor, the tests and the benchmark."""

import torch
import torch.nn.functional as F

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.forgetting_attention import forgetting_attention
from hybridlm_kernels.random_inputs import bench_inputs


def _check() -> Inputs:
    return {**randn(q=(2, 150, 4, 32), k=(2, 150, 2, 32), v=(2, 150, 2, 32)),
            "g": F.logsigmoid(torch.randn(2, 150, 4, dtype=torch.float64))}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    gates = F.logsigmoid(torch.randn(s.B, s.T, s.H, device=device) + 4.0)
    return {**bench_inputs("none")(s, dtype, device), "g": gates}


CASES: list[OperationCases] = [(
    [CheckCase("forgetting_attention", "grouped heads", forgetting_attention, _check, causal=True)],
    [BenchCase("causal", forgetting_attention, _bench, lambda s: 2.0 * s.tokens * s.T * s.H * s.D,
               ("q", "k", "v", "g"))])]
