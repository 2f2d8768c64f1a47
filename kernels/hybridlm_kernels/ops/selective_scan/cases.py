"""Cases of the selective scan for the doctor, the tests and the benchmark."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.selective_scan import selective_scan

STATES = 16  # per channel


def _inputs(rows: int, T: int, D: int, N: int, longhorn: bool, **kind: Any) -> Inputs:
    """Inputs with steps between 1e-3 and 1e-1 as models start, or the steps of Longhorn."""
    x, u, B, C = (torch.randn(rows, T, width, **kind) for width in (D, D, N, N))
    if longhorn:
        beta = u.sigmoid()
        return {"x": x, "dt": beta / (1.0 + beta * B.square().sum(-1, keepdim=True)), "B": B, "C": C}
    rates = torch.arange(1.0, N + 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return {"x": x, "dt": F.softplus(u - 4.0), "A": -rates.repeat(D, 1), "B": B, "C": C}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return _inputs(s.B, s.T, s.model_dim, STATES, False, dtype=dtype, device=device)


def _longhorn(x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, **options: Any) -> Any:
    return selective_scan(x, dt, None, B, C, **options)


_check = partial(_inputs, 2, 37, 6, 4, dtype=torch.float64)
CASES: list[OperationCases] = [(
    [CheckCase("selective_scan", "Mamba", selective_scan, partial(_check, False), causal=True),
     CheckCase("selective_scan", "Longhorn", _longhorn, partial(_check, True), causal=True)],
    [BenchCase(f"Mamba, {STATES} states", selective_scan, _bench,
               lambda s: 9.0 * s.tokens * s.model_dim * STATES, ("x", "dt", "A", "B", "C"))])]
