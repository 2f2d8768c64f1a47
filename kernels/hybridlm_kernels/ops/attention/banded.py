"""Attention to a window much shorter than the row: blocks of queries against their own block of keys and two earlier.

The first two blocks are one call. On a CPU the keys of a block are a view of the row, and gradients of keys are added
where they belong while they are in the cache: no copy of overlapping keys is made, forward or backward. Elsewhere, and
with sinks, whose key stands in front of every block, the overlapping blocks are copied.

B rows, T tokens, H query heads, G key/value heads, K head dim, Q queries of a block, N blocks of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.ops.attention.reference import visible
from hybridlm_kernels.precision import plain_backward

SoftmaxAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CPU_PIECE_ELEMENTS = 2**21  # overlapping keys of a piece: their gradients stay in the cache


def band_block(window: int) -> int:
    """Queries of a block: a block reads two earlier ones, so they must span the window.

    >>> band_block(256)
    128
    """
    return max(32, window // 2)


def banded_by_copies(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, window: int,
                     softmax_attention: SoftmaxAttention) -> Tensor:
    """Attention to a window, with a copy of the three blocks of keys that each block of queries reads.

    Args:
        q_BTHK: queries, more than two blocks of them.
        k_BTGK: keys.
        v_BTGV: values.
        window: keys that a query sees, its own included.
        softmax_attention: from queries, keys, values and a mask [queries, keys] to outputs.

    Returns:
        Outputs [B, T, H, V].
    """
    batch, length = q_BTHK.shape[:2]
    size = band_block(window)
    head = 2 * size
    blocks = -(-(length - head) // size)
    missing = head + blocks * size - length  # later than every real query, hence never visible to one
    first = softmax_attention(q_BTHK[:, :head], k_BTGK[:, :head], v_BTGV[:, :head],
                              visible(head, head, window, q_BTHK.device))
    q_BTHK, k_BTGK, v_BTGV = (
        F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x for x in (q_BTHK, k_BTGK, v_BTGV))
    banded = softmax_attention(
        q_BTHK[:, head:].reshape(batch * blocks, size, *q_BTHK.shape[2:]), _WithEarlier.apply(k_BTGK, size),
        _WithEarlier.apply(v_BTGV, size), visible(size, 3 * size, window, q_BTHK.device))
    banded = banded.reshape(batch, blocks * size, *banded.shape[2:])
    return torch.cat([first, banded[:, : length - head]], 1)


class _WithEarlier(torch.autograd.Function):
    """Copies each block and the two before it; a block's gradient is the sum of those of its three copies."""

    @staticmethod
    def forward(ctx: Any, x_BTGX: Tensor, size: int) -> Tensor:
        ctx.batch, ctx.size = x_BTGX.shape[0], size
        x_BNQGX = x_BTGX.unflatten(1, (-1, size))
        return torch.cat([x_BNQGX[:, :-2], x_BNQGX[:, 1:-1], x_BNQGX[:, 2:]], 2).flatten(0, 1)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dy_XQGX: Tensor) -> tuple[Tensor, None]:
        return _sum_copies(dy_XQGX.unflatten(0, (ctx.batch, -1)), ctx.size), None


def _sum_copies(dy_BNQGX: Tensor, size: int) -> Tensor:
    """Gradients of tokens [B, (N + 2) Q, G, X] from those of the three blocks that each of N blocks reads."""
    blocks = dy_BNQGX.shape[1]
    total = dy_BNQGX.new_zeros(dy_BNQGX.shape[0], blocks + 2, size, *dy_BNQGX.shape[3:])
    for place in range(3):
        total[:, place : place + blocks] += dy_BNQGX[:, :, place * size : (place + 1) * size]
    return total.flatten(1, 2)


def banded_by_views(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, window: int, scale: float) -> Tensor:
    """Attention to a window on a CPU, on the keys where they are.

    Args:
        q_BTHK: queries, more than two blocks of them.
        k_BTGK: keys.
        v_BTGK: values, with as many dims as keys.
        window: keys that a query sees, its own included.
        scale: factor on the scores.

    Returns:
        Outputs [B, T, H, K].
    """
    if torch.is_autocast_enabled("cpu") and q_BTHK.dtype != torch.float64:  # as for scaled_dot_product_attention
        dtype = torch.get_autocast_dtype("cpu")
        q_BTHK, k_BTGK, v_BTGK = q_BTHK.to(dtype), k_BTGK.to(dtype), v_BTGK.to(dtype)
    return _BandedAttention.apply(q_BTHK, k_BTGK, v_BTGK, window, scale)


class _Piece(NamedTuple):
    """Some blocks of some rows, or their first two.

    Args:
        rows: the rows.
        queries: their queries.
        keys: all keys that these may see.
        mask: added to the scores of a block.
    """

    rows: slice
    queries: slice
    keys: slice
    mask: Tensor


class _Blocks:
    """The pieces of a call, and its tensors as a piece reads them: [blocks, heads, tokens, K]."""

    def __init__(self, q_BTHK: Tensor, k_BTGK: Tensor, window: int):
        self.batch, self.length = q_BTHK.shape[:2]
        self.size, self.window, self.dtype = band_block(window), window, q_BTHK.dtype
        self.most = max(1, CPU_PIECE_ELEMENTS // (3 * self.size * k_BTGK.shape[2] * k_BTGK.shape[3]))

    def _mask(self, queries: int, keys: int) -> Tensor:
        hidden = ~visible(queries, keys, self.window, torch.device("cpu"))
        return torch.zeros(queries, keys, dtype=self.dtype).masked_fill_(hidden, -torch.inf)

    def pieces(self) -> Iterator[_Piece]:
        """Yields the first two blocks of all rows, and then pieces whose keys stay in the cache."""
        size, head, end = self.size, 2 * self.size, self.length
        yield _Piece(slice(0, self.batch), slice(0, head), slice(0, head), self._mask(head, head))
        mask = self._mask(size, 3 * size)
        rows = max(1, self.most // -(-(end - head) // size))
        for row in range(0, self.batch, rows):
            for start in range(head, end, self.most * size):
                stop = min(start + self.most * size, end)
                yield _Piece(slice(row, row + rows), slice(start, stop), slice(start - head, stop), mask)

    def _whole(self, x_BTGK: Tensor) -> Tensor:
        """Tokens of a piece, with zeros up to a multiple of a block: they are later than every query that counts."""
        missing = -x_BTGK.shape[1] % self.size
        return F.pad(x_BTGK, (0, 0, 0, 0, 0, missing)) if missing else x_BTGK

    def of_queries(self, x_BTHK: Tensor, piece: _Piece) -> Tensor:
        """Queries, outputs or gradients of these."""
        x = x_BTHK[piece.rows, piece.queries]
        if piece.queries.start:
            x = self._whole(x).unflatten(1, (-1, self.size)).flatten(0, 1)
        return x.transpose(1, 2)

    def of_keys(self, x_BTGK: Tensor, piece: _Piece) -> Tensor:
        """Keys or values; those of a row are no copy."""
        x = x_BTGK[piece.rows, piece.keys]
        if piece.queries.start == 0:
            return x.transpose(1, 2)
        return self._whole(x).unfold(1, 3 * self.size, self.size).transpose(-1, -2).flatten(0, 1)

    def put_queries(self, total_BTHK: Tensor, piece: _Piece, x: Tensor) -> None:
        """Writes what `of_queries` reads."""
        place = total_BTHK[piece.rows, piece.queries]
        place.copy_(x.transpose(1, 2).reshape(place.shape[0], -1, *place.shape[2:])[:, : place.shape[1]])

    def add_keys(self, total_BTGK: Tensor, piece: _Piece, dx: Tensor) -> None:
        """Adds the gradients of what `of_keys` reads."""
        place = total_BTGK[piece.rows, piece.keys]
        if piece.queries.start:
            dx_BNQGK = dx.transpose(1, 2).unflatten(0, (place.shape[0], -1))
            place += _sum_copies(dx_BNQGK, self.size)[:, : place.shape[1]]
        else:
            place += dx.transpose(1, 2)


class _BandedAttention(torch.autograd.Function):
    """Keeps inputs, outputs and log sums, as the fused kernel does."""

    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, window: int, scale: float) -> Tensor:
        blocks, sums = _Blocks(q_BTHK, k_BTGK, window), []
        o_BTHK = torch.empty_like(q_BTHK, memory_format=torch.contiguous_format)
        for piece in blocks.pieces():
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                blocks.of_queries(q_BTHK, piece), blocks.of_keys(k_BTGK, piece), blocks.of_keys(v_BTGK, piece),
                attn_mask=piece.mask, scale=scale)
            blocks.put_queries(o_BTHK, piece, o)
            sums.append(lse)
        ctx.window, ctx.scale = window, scale
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGK, o_BTHK, *sums)
        return o_BTHK

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHK, k_BTGK, v_BTGK, o_BTHK, *sums = ctx.saved_tensors
        blocks = _Blocks(q_BTHK, k_BTGK, ctx.window)
        dq, dk, dv = torch.empty_like(o_BTHK), *(torch.zeros(x.shape, dtype=x.dtype) for x in (k_BTGK, v_BTGK))
        for piece, lse in zip(blocks.pieces(), sums, strict=True):
            dq_piece, dk_piece, dv_piece = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                blocks.of_queries(do_BTHK, piece), blocks.of_queries(q_BTHK, piece), blocks.of_keys(k_BTGK, piece),
                blocks.of_keys(v_BTGK, piece), blocks.of_queries(o_BTHK, piece), lse, 0.0, False,
                attn_mask=piece.mask, scale=ctx.scale)
            blocks.put_queries(dq, piece, dq_piece)
            blocks.add_keys(dk, piece, dk_piece)
            blocks.add_keys(dv, piece, dv_piece)
        return dq, dk, dv, None, None
