"""Sinkhorn-Knopp: positive matrices become doubly stochastic (mHC).

Legend: M rows and columns of a matrix.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.sinkhorn import reference, torch_backend
from hybridlm_kernels.precision import wide
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("sinkhorn", (
    Backend("torch", torch_backend.sinkhorn), Backend("reference", reference.sinkhorn))))


def _outputs(matrix_MM: Tensor, iterations: int = 20, eps: float = 1e-6, **_: Any) -> Tensor:
    return wide(matrix_MM.new_empty(matrix_MM.shape))


@compilable(_outputs, keeps=("matrix_MM",))
def sinkhorn(matrix_MM: Tensor, iterations: int = 20, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """Normalise the columns of positive matrices, then their rows and columns in turn.

    The result converges to a doubly stochastic matrix: all rows and all columns sum to 1.

    Args:
        matrix_MM: positive matrices [..., M, M].
        iterations: how often columns are normalised; rows are normalised once less.
        eps: added to every sum.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        [..., M, M] in float32 (float64 for float64 matrices).

    Raises:
        ValueError: the matrices are not square, or there is no iteration.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Xie et al. 2025 (mHC, arXiv 2512.24880); order of the normalisations as in DeepSeek-V4.

    >>> import torch
    >>> x = sinkhorn(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), eps=0.0)
    >>> torch.allclose(x.sum(0), torch.ones(2)), torch.allclose(x.sum(1), torch.ones(2))
    (True, True)
    """
    if matrix_MM.dim() < 2 or matrix_MM.shape[-1] != matrix_MM.shape[-2]:
        raise ValueError(f"sinkhorn: matrices must be square, [..., M, M]; got {list(matrix_MM.shape)}")
    if iterations < 1:
        raise ValueError(f"sinkhorn: iterations must be positive; got {iterations}")
    run = choose(OPERATION, Call.of(matrix_MM), backend).run
    return run(wide(matrix_MM), iterations, eps)
