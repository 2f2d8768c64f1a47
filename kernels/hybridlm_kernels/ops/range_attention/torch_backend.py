"""Attention of each query to a range of keys, piece by piece of queries, against the keys that one of a piece sees.

Letters as in `ranges`; V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.ops.range_attention.ranges import Ranges, weigh
from hybridlm_kernels.precision import plain_backward, wide


def range_attention(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, first_BT: Tensor, count_BT: Tensor,
                    scale: float) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    batch, groups = k_BEGK.shape[0], k_BEGK.shape[2]
    heads_first = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTHK.unflatten(2, (groups, -1)), k_BEGK, v_BEGV))
    found = _TorchRangeAttention.apply(*heads_first, Ranges(first_BT, count_BT), scale)
    o_BTHV, lse_BTH = (x.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3) for x in found)
    return o_BTHV, lse_BTH


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
        for piece in ranges.pieces(shape[0] * shape[2], keys):
            rows, seen = piece.queries, piece.keys
            p_XMC, total_XM1, most_XM1 = weigh(q_XTRK, k, ranges, piece)
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
        for piece in ranges.pieces(q_XTRK.shape[0] * q_XTRK.shape[2], keys):
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
