"""Cases of the rotation of positions for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.rotary import rotary


def _check() -> Inputs:
    made = randn(x=(2, 33, 4, 32), cos=(33, 8), sin=(33, 8))
    return made | {"cos": torch.cos(made["cos"]), "sin": torch.sin(made["sin"])}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    angle_TR = torch.outer(torch.arange(s.T, device=device), 1e4 ** -torch.linspace(0, 1, s.D // 2, device=device))
    return {"x": torch.randn(s.B, s.T, s.H, s.D, dtype=dtype, device=device), "cos": angle_TR.cos(),
            "sin": angle_TR.sin()}


CASES: list[OperationCases] = [(
    [CheckCase("rotary", "partial, interleaved", rotary, _check, {"interleaved": True}, fixed=("cos", "sin"))],
    [BenchCase("all dims", rotary, _bench, lambda s: 3.0 * s.tokens * s.H * s.D, ("x",))])]
