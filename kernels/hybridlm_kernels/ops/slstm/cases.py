"""Cases of sLSTM for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases, Shape, randn, token_inputs
from hybridlm_kernels.ops.slstm import slstm


def _shapes(s: Shape) -> dict[str, tuple[int, ...]]:
    return {"x": (s.B, s.T, s.H, 4, s.D), "R": (s.H, 4, s.D, s.D)}


def _check() -> dict[str, torch.Tensor]:
    return randn(x=(2, 19, 2, 4, 5), R=(2, 4, 5, 5))


CASES: list[OperationCases] = [(
    [CheckCase("slstm", "sLSTM", slstm, _check, causal=True)],
    [BenchCase("sLSTM", slstm, token_inputs(_shapes), lambda s: s.tokens * s.H * (8.0 * s.D**2 + 20.0 * s.D),
               ("x", "R"))])]
