"""Products of decays inside chunks as differentiable tensors, and scores between any rows and columns under them.

As in `decay_products.py` products are built by doubling, from those inside blocks of 1, 2, 4, ... tokens: each factor
is a product of numbers in [0, 1], nothing is divided, and no two large sums are subtracted. That file serves queries
and keys of a plain delta rule; here rows and columns are any, and rows decay up to their token or to the one before.

A decay g_t is a factor of every pair j < t <= i, so its gradient is the sum over i >= t of row times its gradient, less
that of column times its gradient; a row that decays up to the token before counts at that token.

Legend: X chunk-heads, C tokens per chunk, K key dim, b tokens per half block, M pairs of half blocks, R rows, D
columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.recurrence.decay_products import (
    corner_blocks,
    doublings,
    drop_negligible,
    extend_products,
    sum_from_and_before,
)


class DecayPairs:
    """Decays of the tokens of chunks, and what follows from them.

    Args:
        g_XCK: logarithm of the decays, [X, C, K] or [X, C, 1]; None where nothing decays.
        like_XCK: a tensor that gives the number of tokens, dtype and device.
    """

    def __init__(self, g_XCK: Tensor | None, like_XCK: Tensor):
        self.g = like_XCK.new_zeros(1, like_XCK.shape[1], 1) if g_XCK is None else g_XCK
        products: tuple[Tensor, Tensor] = _Products.apply(self.g)
        self.prefix, self.suffix = products  # a_1 ... a_i and a_{j+1} ... a_C, [X, C, K | 1]

    @property
    def prefix_before(self) -> Tensor:
        """The products a_1 ... a_{i-1}, [X, C, K | 1]."""
        return _shifted(self.prefix)

    @property
    def total(self) -> Tensor:
        """The products over the chunk, [X, K | 1, 1]."""
        return self.prefix[:, -1, :, None]

    def scores(self, rows: Sequence[Tensor], columns: Sequence[Tensor], before: Sequence[bool]) -> list[list[Tensor]]:
        """Scores x_i . (a_{j+1} ... a_i) y_j strictly below the diagonal, [X, C, C], for each row and each column.

        Args:
            rows: tensors x [X, C, K].
            columns: tensors y [X, C, K].
            before: for each row, whether its products end at a_{i-1}.
        """
        if self.g.shape[-1] == 1:  # one decay for all channels: a product of the decays alone, times plain scores
            ends = tuple(dict.fromkeys(before))
            one = torch.ones_like(self.g)
            decays = dict(zip(ends, _Scores.apply(self.g, ends, *[one] * (len(ends) + 1)), strict=True))
            return [[torch.bmm(x, y.mT) * decays[end] for y in columns] for x, end in zip(rows, before, strict=True)]
        found = _Scores.apply(self.g, tuple(before), *rows, *columns)
        return [list(found[r * len(columns) : (r + 1) * len(columns)]) for r in range(len(rows))]


class _Products(torch.autograd.Function):
    """The products a_1 ... a_i and a_{j+1} ... a_C over chunks, both [X, C, K], of a = e^g."""

    @staticmethod
    def forward(ctx: Any, g_XCK: Tensor) -> tuple[Tensor, Tensor]:
        prefix, suffix = drop_negligible(g_XCK.exp()), torch.ones_like(g_XCK)
        C = g_XCK.shape[1]
        for b in doublings(C):
            _extend(prefix, suffix, b)
        ctx.save_for_backward(prefix, suffix)
        return prefix, suffix

    @staticmethod
    def backward(ctx: Any, d_prefix: Tensor, d_suffix: Tensor) -> Tensor:
        prefix, suffix = ctx.saved_tensors
        return sum_from_and_before(prefix * d_prefix, suffix * d_suffix)


class _Scores(torch.autograd.Function):
    """The scores of R rows against D columns, a tuple of R D tensors [X, C, C]: one product per doubling."""

    @staticmethod
    def forward(ctx: Any, g_XCK: Tensor, before: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.before = before
        ctx.save_for_backward(g_XCK, *tensors)
        (X, C, K), R = tensors[0].shape, len(before)
        rows, columns = tensors[:R], tensors[R:]
        scores = g_XCK.new_zeros(R, len(columns), X, C, C)
        prefix, suffix = drop_negligible(g_XCK.exp()), torch.ones_like(g_XCK)
        for b in doublings(C):
            p, s = prefix.view(-1, 2, b, K), suffix.view(-1, 2, b, K)
            ends = _ends(p, before)
            left, right = _decayed(rows, ends, 1), _decayed(columns, [s[:, 0]] * len(columns), 0)
            if b == 1:
                block = (left[:, :, None] * right[:, None]).sum(-1).unsqueeze(-3)  # [M, R, 1, D, 1]
                block = block.view(X, -1, R, 1, len(columns), 1)
            else:
                block = torch.bmm(left.flatten(1, 2), right.flatten(1, 2).mT).view(X, -1, R, b, len(columns), b)
            for r in range(R):
                for d in range(len(columns)):
                    corner_blocks(scores[r, d], b).copy_(block[:, :, r, :, d])
            _extend(prefix, suffix, b)
        return tuple(scores.flatten(0, 1).unbind(0))

    @staticmethod
    def backward(ctx: Any, *d_scores: Tensor) -> tuple[Tensor | None, ...]:
        g_XCK, *tensors = ctx.saved_tensors
        (X, C, K), R = tensors[0].shape, len(ctx.before)
        rows, columns = tensors[:R], tensors[R:]
        D = len(columns)
        # Where a row decays up to the token before, the score against that token knows no decay. Left in, it would
        # enter the gradient of g twice, with both signs, and drown what is left of strong decays.
        next_to = [[d_scores[r * D + d].diagonal(-1, 1, 2)[..., None] for d in range(D)] if read_before else None
                   for r, read_before in enumerate(ctx.before)]
        d_scores = tuple(d_score.tril(-2 if ctx.before[i // D] else -1) for i, d_score in enumerate(d_scores))
        d_rows, d_columns = [torch.zeros_like(x) for x in rows], [torch.zeros_like(y) for y in columns]
        prefix, suffix = drop_negligible(g_XCK.exp()), torch.ones_like(g_XCK)
        for b in doublings(C):
            p, s = prefix.view(-1, 2, b, K), suffix.view(-1, 2, b, K)
            ends = _ends(p, ctx.before)
            left, right = _decayed(rows, ends, 1), _decayed(columns, [s[:, 0]] * D, 0)
            d_block = p.new_empty(X, p.shape[0] // X, R, b, D, b)
            for r in range(R):
                for d in range(D):
                    d_block[:, :, r, :, d] = corner_blocks(d_scores[r * D + d], b)
            d_block = d_block.view(-1, R * b, D * b)
            d_left = torch.bmm(d_block, right.flatten(1, 2)).view_as(left)
            d_right = torch.bmm(d_block.mT, left.flatten(1, 2)).view_as(right)
            for r, d_row in enumerate(d_rows):
                d_row.view(-1, 2, b, K)[:, 1].addcmul_(d_left[:, r], ends[r])
            for d, d_column in enumerate(d_columns):
                d_column.view(-1, 2, b, K)[:, 0].addcmul_(d_right[:, d], s[:, 0])
            _extend(prefix, suffix, b)
        d_g = None
        if ctx.needs_input_grad[0]:
            pairs = torch.zeros_like(g_XCK)
            for x, dx, read_before in zip(rows, d_rows, ctx.before, strict=True):
                if read_before:
                    pairs[:, :-1] += x[:, 1:] * dx[:, 1:]
                else:
                    pairs.addcmul_(x, dx)
            for y, dy in zip(columns, d_columns, strict=True):
                pairs.addcmul_(y, dy, value=-1)
            d_g = sum_from_and_before(pairs)
        for r, of_row in enumerate(next_to):
            for d, d_score in enumerate(of_row or ()):
                d_rows[r][:, 1:].addcmul_(d_score, columns[d][:, :-1])
                d_columns[d][:, :-1].addcmul_(d_score, rows[r][:, 1:])
        return d_g, None, *d_rows, *d_columns


def _extend(prefix_XCK: Tensor, suffix_XCK: Tensor, b: int) -> None:
    """Extend products inside blocks of b tokens to blocks of 2b, in place; those far below rounding become zero."""
    K = prefix_XCK.shape[2]
    extend_products(prefix_XCK.view(-1, 2, b, K), suffix_XCK.view(-1, 2, b, K))


def _ends(p_M2bK: Tensor, before: Sequence[bool]) -> list[Tensor]:
    """For each row the products from the border to its tokens in second halves, or to the ones before: [M, b, K]."""
    second = p_M2bK[:, 1]
    shifted = _shifted(second) if any(before) else second
    return [shifted if read_before else second for read_before in before]


def _decayed(tensors: Sequence[Tensor], factors: Sequence[Tensor], half: int) -> Tensor:
    """One half of each block of tensors [X, C, K] times its factor [M, b, K]: [M, len(tensors), b, K]."""
    M, b, K = factors[0].shape
    out = factors[0].new_empty(M, len(tensors), b, K)
    for i, (x, factor) in enumerate(zip(tensors, factors, strict=True)):
        torch.mul(x.view(-1, 2, b, K)[:, half], factor, out=out[:, i])
    return out


def _shifted(products: Tensor) -> Tensor:
    """Products that end one token earlier, along the last dim but one: 1 for the first token."""
    return torch.cat([torch.ones_like(products[..., :1, :]), products[..., :-1, :]], -2)
