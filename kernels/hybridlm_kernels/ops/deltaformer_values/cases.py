"""Cases of DeltaFormer's values for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.deltaformer_values import deltaformer_values
from hybridlm_kernels.random_inputs import bench_inputs


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return {**bench_inputs("none")(s, dtype, device), "beta": torch.rand(s.B, s.T, s.H, device=device)}


CASES: list[OperationCases] = [(
    [CheckCase("deltaformer_values", "grouped heads", deltaformer_values,
               lambda: {**randn(q=(1, 90, 2, 8), k=(1, 90, 1, 8), v=(1, 90, 1, 8)),
                        "beta": torch.rand(1, 90, 2, dtype=torch.float64)}, causal=True)],
    [BenchCase("causal", deltaformer_values, _bench, lambda s: 2.0 * s.tokens * s.T * s.H * s.D,
               ("q", "k", "v", "beta"))])]
