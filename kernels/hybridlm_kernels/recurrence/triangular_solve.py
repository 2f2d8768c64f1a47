"""Block solver of unit lower triangular systems (I + L diag(beta)) Z = R: small matrix products instead of LAPACK.

Legend: X systems, C unknowns, W right hand sides, c unknowns per block, n = C / c blocks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.recurrence.decay_products import drop_tiny

BLOCK_UNKNOWNS = 16


@lru_cache(maxsize=32)
def _level_masks(c: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Masks, for b = 1, 2, 4, ..., of the entries that join the two halves of every diagonal block of size 2b."""
    i = torch.arange(c, device=device)
    row, column = i[:, None], i[None]
    sizes = [2**e for e in range(c.bit_length() - 1)]
    return tuple(((row // (2 * b) == column // (2 * b)) & (row // b % 2 == 1) & (column // b % 2 == 0)).to(dtype)
                 for b in sizes)


def block_inverses(L_XCC: Tensor, beta_XC1: Tensor | None, *, drop: bool = False) -> Tensor:
    """Inverses [X, n, c, c] of the diagonal blocks of I + L diag(beta). Only L's strictly lower part is read.

    Blocks are doubled: with T the inverse at block size b, the inverse at 2b is T - T L_b T, where L_b holds the
    entries that join the halves. No power of L is formed: its entries would grow beyond those of the inverse and lose
    digits. `drop` sets numbers to zero with which a CPU is slow (`drop_tiny`).
    """
    X, C, _ = L_XCC.shape
    c = min(BLOCK_UNKNOWNS, C)
    n = C // c
    s_X, s_row, s_col = L_XCC.stride()
    D = L_XCC.as_strided((X, n, c, c), (s_X, c * (s_row + s_col), s_row, s_col), L_XCC.storage_offset())
    D = (D.reshape(X * n, c, c) if beta_XC1 is None else (D * beta_XC1.view(X, n, 1, c)).view(X * n, c, c))
    masks = _level_masks(c, L_XCC.dtype, L_XCC.device)
    T = torch.mul(D, masks[0]).neg_() if masks else torch.zeros_like(D)
    T.diagonal(dim1=1, dim2=2).fill_(1)
    for mask in masks[1:]:
        joined = torch.bmm(T, D * mask)
        T = torch.baddbmm(T, drop_tiny(joined) if drop else joined, T, alpha=-1)
        if drop:
            drop_tiny(T)
    return T.view(X, n, c, c)


def solve(L_XCC: Tensor, beta_XC1: Tensor | None, inverse_Xncc: Tensor, R_XCW: Tensor,
          widths: tuple[int, ...], *, drop: bool = False) -> list[Tensor]:
    """Solve (I + L diag(beta)) Z = R for Z [X, C, W], L strictly lower; returns Z as tensors [X, C, w] of `widths`.

    `drop` sets numbers to zero with which a CPU is slow (`drop_tiny`).
    """
    n, c = inverse_Xncc.shape[1:3]
    remaining = R_XCW
    solved = []
    for i in range(n):
        a, b = i * c, (i + 1) * c
        z = torch.bmm(inverse_Xncc[:, i], remaining[:, :c])
        if drop:
            drop_tiny(z)
        solved.append(z.split(widths, dim=-1))
        if b < n * c:
            written = z if beta_XC1 is None else z * beta_XC1[:, a:b]
            remaining = torch.baddbmm(remaining[:, c:], L_XCC[:, b:, a:b], written, alpha=-1)
            if drop:
                drop_tiny(remaining)
    return [torch.cat(blocks, dim=1) for blocks in zip(*solved, strict=True)]


def solve_transposed(L_XCC: Tensor, beta_XC1: Tensor | None, inverse_Xncc: Tensor,
                     R_XCW: Tensor) -> tuple[Tensor, Tensor]:
    """Solve (I + L diag(beta))^T Y = beta R, L strictly lower; returns Y and R - L^T Y, so Y = beta (R - L^T Y)."""
    n, c = inverse_Xncc.shape[1:3]
    remaining = R_XCW
    Y, residual = [], []
    for i in reversed(range(n)):
        a, b = i * c, (i + 1) * c
        r = remaining[:, a:b]
        y = torch.bmm(inverse_Xncc[:, i].mT, r if beta_XC1 is None else r * beta_XC1[:, a:b])
        Y.append(y)
        if beta_XC1 is not None:
            residual.append(torch.baddbmm(r, L_XCC[:, a:b, a:b].mT, y, alpha=-1))
        if i > 0:
            remaining = torch.baddbmm(remaining[:, :a], L_XCC[:, a:b, :a].mT, y, alpha=-1)
    Y_XCW = torch.cat(Y[::-1], dim=1)
    return Y_XCW, Y_XCW if beta_XC1 is None else torch.cat(residual[::-1], dim=1)


class UnitTriangularSolve(torch.autograd.Function):
    """Solve (I + L) Z = R for Z [X, C, W], differentiable; only the strictly lower part of L is read."""

    @staticmethod
    def forward(ctx: Any, L_XCC: Tensor, R_XCW: Tensor) -> Tensor:
        inverse_Xncc = block_inverses(L_XCC, None)
        (Z_XCW,) = solve(L_XCC, None, inverse_Xncc, R_XCW, (R_XCW.shape[-1],))
        ctx.save_for_backward(L_XCC, inverse_Xncc, Z_XCW)
        return Z_XCW

    @staticmethod
    def backward(ctx: Any, dZ_XCW: Tensor) -> tuple[Tensor, Tensor]:
        L_XCC, inverse_Xncc, Z_XCW = ctx.saved_tensors
        dR_XCW, _ = solve_transposed(L_XCC, None, inverse_Xncc, dZ_XCW)
        return torch.bmm(dR_XCW, Z_XCW.mT).tril_(-1).neg_(), dR_XCW
