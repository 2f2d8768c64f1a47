"""Cases of log-linear attention for the doctor, the tests and the benchmark."""

from functools import partial

import torch
from torch.nn.functional import normalize

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.log_linear_attention import log_linear_attention

LEVELS = 8


def _inputs(B: int, T: int, H: int, K: int, delta: bool, dtype: torch.dtype, device: str) -> Inputs:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    wide = torch.promote_types(dtype, torch.float32)
    found = {"q": normalize(randn(B, T, H, K), dim=-1), "k": normalize(randn(B, T, H, K), dim=-1),
             "v": randn(B, T, H, K), "lambda": torch.rand(B, T, H, LEVELS, dtype=wide, device=device),
             "g": -0.1 * torch.rand(B, T, H, dtype=wide, device=device)}
    return found | {"beta": torch.rand(B, T, H, dtype=wide, device=device)} if delta else found


def _check(delta: bool) -> Inputs:
    return _inputs(2, 150, 2, 8, delta, torch.float64, "cpu")


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return _inputs(s.B, s.T, s.H, s.D, False, dtype, device)


CASES: list[OperationCases] = [(
    [CheckCase("log_linear_attention", label, log_linear_attention, partial(_check, delta), causal=True)
     for label, delta in (("linear attention", False), ("delta rule", True))],
    [BenchCase("log-linear attention", log_linear_attention, _bench, lambda s: (LEVELS + 3.0) * s.tokens * s.H * s.D**2,
               ("q", "k", "v", "lambda", "g"))])]
