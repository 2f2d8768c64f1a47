"""Cases of the mesa solve for the doctor, the tests and the benchmark."""

import torch
from torch.nn.functional import normalize

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.mesa_solve import mesa_solve


def _inputs(B: int, T: int, H: int, K: int, dtype: torch.dtype, device: str) -> Inputs:
    wide = torch.promote_types(dtype, torch.float32)
    q, k = (normalize(torch.randn(B, T, H, K, dtype=dtype, device=device), dim=-1) for _ in range(2))
    return {"q": q, "k": k, "beta": torch.rand(B, T, H, dtype=wide, device=device),
            "g": -0.5 * torch.rand(B, T, H, dtype=wide, device=device),
            "lambda": 0.5 + torch.rand(H, K, dtype=wide, device=device)}


def _check() -> Inputs:
    return _inputs(2, 70, 2, 8, torch.float64, "cpu")


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return _inputs(s.B, s.T, s.H, s.D, dtype, device)


CASES: list[OperationCases] = [(
    [CheckCase("mesa_solve", "30 iterations", mesa_solve, _check, causal=True)],
    [BenchCase("MesaNet", mesa_solve, _bench, lambda s: 30 * 5.0 * s.tokens * s.H * s.D**2,
               ("q", "k", "beta", "g", "lambda"))])]
