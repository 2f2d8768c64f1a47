"""Attention of each query to a range of keys, piece by piece of queries, against the keys that one of a piece sees.

X rows of one key head (B * G), T queries, R query heads of a key head, E keys, K key dim, V value dim; M rows of a
piece (queries times R), C keys that one of them sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward, wide

CPU_PIECE_ELEMENTS = 2**18  # scores of a piece: they stay in the cache
GPU_PIECE_ELEMENTS = 2**26
MIN_QUERIES = 8  # of a piece


class Piece(NamedTuple):
    """Consecutive queries, and the keys that they see.

    Args:
        queries: the queries.
        keys: holds all keys that one of them sees.
        mixed: the parts of `keys` that not all of these queries see.
    """

    queries: slice
    keys: slice
    mixed: list[slice]


def range_attention(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, first_BT: Tensor, count_BT: Tensor,
                    scale: float) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    batch, groups = k_BEGK.shape[0], k_BEGK.shape[2]
    heads_first = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTHK.unflatten(2, (groups, -1)), k_BEGK, v_BEGV))
    found = _TorchRangeAttention.apply(*heads_first, Ranges(first_BT, count_BT), scale)
    o_BTHV, lse_BTH = (x.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3) for x in found)
    return o_BTHV, lse_BTH


class Ranges:
    """Ranges of keys of queries, and pieces of consecutive queries.

    Args:
        first_BT: the first key of each query.
        count_BT: number of its keys.
    """

    def __init__(self, first_BT: Tensor, count_BT: Tensor):
        self.first_BT, self.last_BT = first_BT, first_BT + count_BT

    def pieces(self, scores_per_query: int, keys: int) -> Iterator[Piece]:
        """Pieces of the queries whose scores stay within the limit of the device; those that see no key are left out.

        On a CPU the keys of a piece are as few as can be. Elsewhere nothing waits for the device: they are all keys.

        Args:
            scores_per_query: number of scores of a query over all rows and heads.
            keys: E.
        """
        on_cpu, queries = self.first_BT.device.type == "cpu", self.first_BT.shape[1]
        size = max(MIN_QUERIES, (CPU_PIECE_ELEMENTS if on_cpu else GPU_PIECE_ELEMENTS) // max(1, scores_per_query))
        for start in range(0, queries, size):
            rows = slice(start, min(start + size, queries))
            if not on_cpu:
                yield Piece(rows, slice(0, keys), [slice(0, keys)])
                continue
            first, last = self.first_BT[:, rows], self.last_BT[:, rows]
            some = last > first
            low, high = int(first.where(some, keys).min()), int(last.where(some, 0).max())
            all_from, all_to = int(first.max()), int(last.min())  # seen by all, if there are any
            mixed = [slice(low, all_from), slice(all_to, high)] if all_from < all_to else [slice(low, high)]
            if low < high:
                yield Piece(rows, slice(low, high), [part for part in mixed if part.start < part.stop])

    def hide(self, score_XMC: Tensor, piece: Piece, fill: float) -> None:
        """Fill in place what is not seen, in the keys that some queries of a piece see and some do not."""
        first_BQ1, last_BQ1 = (x[:, piece.queries, None] for x in (self.first_BT, self.last_BT))
        batch, queries = first_BQ1.shape[:2]
        score_BGQRC = score_XMC.view(batch, -1, queries, score_XMC.shape[1] // queries, score_XMC.shape[2])
        for keys in piece.mixed:
            key_C = torch.arange(keys.start, keys.stop, device=score_XMC.device)
            unseen_BQC = (key_C < first_BQ1) | (key_C >= last_BQ1)
            columns = slice(keys.start - piece.keys.start, keys.stop - piece.keys.start)
            score_BGQRC[..., columns].masked_fill_(unseen_BQC[:, None, :, None], fill)


class _TorchRangeAttention(torch.autograd.Function):
    """Inputs, outputs and log sums are kept, and the backward computes the weights again."""

    @staticmethod
    def forward(ctx: Any, q_XTRK: Tensor, k_XEK: Tensor, v_XEV: Tensor, ranges: Ranges,
                scale: float) -> tuple[Tensor, Tensor]:
        shape, keys = q_XTRK.shape[:3], k_XEK.shape[1]
        dtype = torch.promote_types(q_XTRK.dtype, torch.float32)
        o_XTRV = q_XTRK.new_zeros(*shape, v_XEV.shape[2], dtype=dtype)
        lse_XTR = q_XTRK.new_full(shape, -torch.inf, dtype=dtype)
        k, v = wide(k_XEK) * scale, wide(v_XEV)
        for piece in ranges.pieces(shape[0] * shape[2] * keys, keys):
            rows, seen = piece.queries, piece.keys
            p_XMC = torch.bmm(wide(q_XTRK[:, rows]).flatten(1, 2), k[:, seen].transpose(1, 2))
            ranges.hide(p_XMC, piece, -torch.inf)
            most_XM1 = p_XMC.amax(-1, keepdim=True)
            most_XM1.masked_fill_(most_XM1 == -torch.inf, 0.0)
            total_XM1 = p_XMC.sub_(most_XM1).exp_().sum(-1, keepdim=True)
            o_XMV = torch.bmm(p_XMC, v[:, seen])
            o_XMV /= total_XM1.masked_fill(total_XM1 == 0, 1.0)
            o_XTRV[:, rows] = o_XMV.unflatten(1, (-1, shape[2]))
            lse_XTR[:, rows] = total_XM1.log_().add_(most_XM1).view(shape[0], -1, shape[2])
        ctx.save_for_backward(q_XTRK, k_XEK, v_XEV, o_XTRV, lse_XTR)
        ctx.ranges, ctx.scale = ranges, scale
        return o_XTRV.to(v_XEV.dtype), lse_XTR

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do_XTRV: Tensor, dlse_XTR: Tensor) -> tuple[Tensor | None, ...]:
        q_XTRK, k_XEK, v_XEV, o_XTRV, lse_XTR = ctx.saved_tensors
        ranges, keys = ctx.ranges, k_XEK.shape[1]
        k, v, do_XTRV = wide(k_XEK) * ctx.scale, wide(v_XEV), wide(do_XTRV)
        delta_XTR = (do_XTRV * o_XTRV).sum(-1) - dlse_XTR  # ds = p (do . v - delta)
        safe_XTR = lse_XTR.masked_fill(lse_XTR == -torch.inf, torch.inf)  # exp(score - inf) = 0 where nothing is seen
        dq_XTRK = torch.zeros_like(q_XTRK, dtype=o_XTRV.dtype)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for piece in ranges.pieces(q_XTRK.shape[0] * q_XTRK.shape[2] * keys, keys):
            rows, seen = piece.queries, piece.keys
            q_XMK, do_XMV = wide(q_XTRK[:, rows]).flatten(1, 2), do_XTRV[:, rows].flatten(1, 2)
            p_XMC = torch.bmm(q_XMK, k[:, seen].transpose(1, 2)).sub_(safe_XTR[:, rows].flatten(1)[..., None]).exp_()
            ranges.hide(p_XMC, piece, 0.0)
            ds_XMC = torch.bmm(do_XMV, v[:, seen].transpose(1, 2)).sub_(delta_XTR[:, rows].flatten(1)[..., None])
            ds_XMC *= p_XMC
            dv[:, seen] += torch.bmm(p_XMC.transpose(1, 2), do_XMV)
            dk[:, seen] += torch.bmm(ds_XMC.transpose(1, 2), q_XMK)
            dq_XTRK[:, rows] = torch.bmm(ds_XMC, k[:, seen]).view_as(dq_XTRK[:, rows])
        dk *= ctx.scale
        return dq_XTRK.to(q_XTRK.dtype), dk.to(k_XEK.dtype), dv.to(v_XEV.dtype), None, None
