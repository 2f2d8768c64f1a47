"""Cases of linear attention with a decay per value channel for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.value_decay_attention import value_decay_attention


def _inputs(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, device: str, strength: float) -> Inputs:
    made = {name: torch.randn(B, T, H, size, dtype=dtype, device=device)
            for name, size in (("q", K), ("k", K), ("v", V))}
    g = -strength * torch.rand(B, T, H, V, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return made | {"g": g}


def _check() -> Inputs:
    return _inputs(2, 70, 2, 16, 24, torch.float64, "cpu", 3.0)


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return _inputs(s.B, s.T, s.H, s.D, s.D, dtype, device, 0.1)


CASES: list[OperationCases] = [(
    [CheckCase("value_decay_attention", "slots", value_decay_attention, _check, causal=True)],
    [BenchCase("GSA, keys of slots", value_decay_attention, _bench, lambda s: 5.0 * s.tokens * s.H * s.D**2,
               ("q", "k", "v", "g"))])]
