"""Cases of the diagonal state space model for the doctor, the tests and the benchmark."""

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.diagonal_ssm import diagonal_ssm
from hybridlm_kernels.precision import wide

MODES = 32


def _of_reals(x: Tensor, rate: Tensor, angle: Tensor, c: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The operation with complex numbers made from real ones."""
    rate, angle, c = wide(rate), wide(angle), wide(c)
    return diagonal_ssm(x, torch.complex(-rate, angle), torch.complex(c, 1.0 - c), **options)


def _inputs(size: tuple[int, ...], modes: int, dtype: torch.dtype, device: str, precision: torch.dtype) -> Inputs:
    rate, angle, c = torch.rand(3, size[2], modes, dtype=precision, device=device)
    return {"x": torch.randn(*size, dtype=dtype, device=device), "rate": 0.1 * rate, "angle": 3.0 * angle, "c": c}


def _check() -> Inputs:
    return _inputs((2, 70, 6, 2), 4, torch.float64, "cpu", torch.float64)


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    reals = _inputs((s.B, s.T, s.model_dim, 1), MODES, dtype, device, torch.float32)
    return {"x": reals["x"], "log_a": torch.complex(-reals["rate"], reals["angle"]),
            "c": torch.complex(reals["c"], 1.0 - reals["c"])}


CASES: list[OperationCases] = [(
    [CheckCase("diagonal_ssm", "two inputs per channel", _of_reals, _check, causal=True)],
    [BenchCase("32 pairs of modes", diagonal_ssm, _bench, lambda s: 10.0 * MODES * s.tokens * s.model_dim,
               ("x", "log_a", "c"))])]
