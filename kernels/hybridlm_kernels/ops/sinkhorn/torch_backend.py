"""Sinkhorn-Knopp whose backward keeps the input alone, and computes the normalisations again.

A normalisation y = x / s with s = sum(x) + eps has the gradient (g - sum(g y)) / s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward

ROWS, COLUMNS = -1, -2  # the dim over which a sum is taken


def sinkhorn(matrix_MM: Tensor, iterations: int, eps: float) -> Tensor:
    """See `hybridlm_kernels.sinkhorn`."""
    return _Sinkhorn.apply(matrix_MM, iterations, eps)


def _dims(iterations: int) -> list[int]:
    return [COLUMNS, *[ROWS, COLUMNS] * (iterations - 1)]


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix_MM: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(matrix_MM)
        ctx.iterations, ctx.eps = iterations, eps
        for dim in _dims(iterations):
            matrix_MM = matrix_MM / (matrix_MM.sum(dim, keepdim=True) + eps)
        return matrix_MM

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_MM: Tensor) -> tuple[Tensor, None, None]:
        (matrix_MM,) = ctx.saved_tensors
        steps = []
        for dim in _dims(ctx.iterations):
            total = matrix_MM.sum(dim, keepdim=True) + ctx.eps
            matrix_MM = matrix_MM / total
            steps.append((dim, total, matrix_MM))
        for dim, total, result_MM in reversed(steps):
            grad_MM = (grad_MM - (grad_MM * result_MM).sum(dim, keepdim=True)) / total
        return grad_MM, None, None
