"""Sinkhorn-Knopp, one normalisation after the other."""

from __future__ import annotations

from torch import Tensor


def sinkhorn(matrix_MM: Tensor, iterations: int, eps: float) -> Tensor:
    """See `hybridlm_kernels.sinkhorn`."""
    matrix_MM = matrix_MM / (matrix_MM.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix_MM = matrix_MM / (matrix_MM.sum(-1, keepdim=True) + eps)
        matrix_MM = matrix_MM / (matrix_MM.sum(-2, keepdim=True) + eps)
    return matrix_MM
