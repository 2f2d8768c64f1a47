"""Cases of 2-simplicial attention for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.simplicial_attention import simplicial_attention
from hybridlm_kernels.random_inputs import bench_inputs

WINDOWS = {"window": 64, "second_window": 8}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    inputs = bench_inputs("none")(s, dtype, device)
    return {**inputs, "k2": inputs["k"].clone(), "v2": inputs["v"].clone()}


CASES: list[OperationCases] = [(
    [CheckCase("simplicial_attention", "grouped heads", simplicial_attention,
               lambda: randn(q=(1, 40, 4, 8), k=(1, 40, 2, 8), v=(1, 40, 2, 8), k2=(1, 40, 2, 8), v2=(1, 40, 2, 8)),
               {"window": 9, "second_window": 4}, causal=True)],
    [BenchCase("windows of 64 and 8", simplicial_attention, _bench, lambda s: 4.0 * s.tokens * 64 * 8 * s.H * s.D,
               ("q", "k", "v", "k2", "v2"), WINDOWS)])]
