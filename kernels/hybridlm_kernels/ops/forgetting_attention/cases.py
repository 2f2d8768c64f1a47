"""Cases of forgetting attention for the doctor, the tests and the benchmark."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, LoopTrips, OperationCases, Shape, randn
from hybridlm_kernels.ops.forgetting_attention import forgetting_attention
from hybridlm_kernels.random_inputs import bench_inputs

TOKENS_PER_STEP = 1024  # that kernels of sums of gates take in a round


def _check() -> Inputs:
    return {**randn(q=(2, 150, 4, 32), k=(2, 150, 2, 32), v=(2, 150, 2, 32)),
            "g": F.logsigmoid(torch.randn(2, 150, 4, dtype=torch.float64))}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    gates = F.logsigmoid(torch.randn(s.B, s.T, s.H, device=device) + 4.0)
    return {**bench_inputs("none")(s, dtype, device), "g": gates}


def loop_trips(s: Shape, kernel: str, constants: Mapping[str, Any]) -> LoopTrips:
    """The trips of loops where nothing is forgotten: over tiles that the diagonal cuts, and over all before them."""
    if kernel in ("sum_gates_kernel", "gate_gradients_kernel"):
        return LoopTrips([-(-s.T // TOKENS_PER_STEP)])
    if kernel in ("first_keys_kernel", "last_queries_kernel"):
        return LoopTrips([-(-s.T // (constants["BLOCK_S"] * constants["TILES"]))])
    queries, keys = constants["BLOCK_T"], constants["BLOCK_S"]
    before, cut = [], []
    if kernel == "key_gradients_kernel":
        for start in range(0, s.T, keys):
            end = min(start + keys, s.T)
            cut.append(-(-(end - 1 - start) // queries))
            before.append(max(0, -(-(s.T - start - cut[-1] * queries) // queries)))
        return LoopTrips([mean(cut), mean(before)])
    for start in range(0, s.T, queries):
        before.append((start + 1) // keys)
        cut.append(-(-(min(start + queries, s.T) - before[-1] * keys) // keys))
    return LoopTrips([mean(before), mean(cut)])


CASES: list[OperationCases] = [(
    [CheckCase("forgetting_attention", "grouped heads", forgetting_attention, _check, causal=True)],
    [BenchCase("FoX", forgetting_attention, _bench, lambda s: 2.0 * s.tokens * s.T * s.H * s.D,
               ("q", "k", "v", "g"), one_head_stands_for_all=True, loop_trips=loop_trips)])]
