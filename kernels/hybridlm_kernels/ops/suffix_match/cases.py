"""Cases of suffix matches for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.suffix_match import suffix_match


def _check() -> Inputs:
    q, k, v = torch.randn(3, 2, 20, 8, dtype=torch.float64)
    return {"q": q, "k": k, "v": v, "scale": torch.randn(8, dtype=torch.float64)}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    q, k, v = torch.randn(3, s.B, s.T, s.model_dim, dtype=dtype, device=device)
    return {"q": q, "k": k, "v": v, "scale": torch.ones(s.model_dim, device=device)}


CASES: list[OperationCases] = [(
    [CheckCase("suffix_match", "bits of one channel", suffix_match, _check, {}),
     CheckCase("suffix_match", "symbols of four channels", suffix_match, _check, {"bits": 4, "unmatched": "zero"})],
    [BenchCase("signs", suffix_match, _bench, lambda s: 1.5 * s.tokens * s.T * s.model_dim, ("q", "k", "v"))])]
