"""Softmax attention to all entries that a query sees, piece by piece of queries, and to a window of tokens beside them.

B rows, T queries, H query heads, G key/value heads, R = H/G, E entries, K/V key/value dim; X = B * G, Q queries of a
piece, C entries that one of them sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hybridlm.model.mixers.common.entries import EntrySpan, EntryWindows
from hybridlm.model.mixers.common.overlap import visible_scores
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import selected_attention
from hybridlm_kernels.precision import plain_backward, wide

CPU_PIECE_ELEMENTS = 2**18  # scores of a piece: they stay in the cache
GPU_PIECE_ELEMENTS = 2**26
MIN_QUERIES = 8  # of a piece


def entry_attention(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, windows: EntryWindows,
                    scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the entries of the complete windows of each query's document; zeros where there are none.

    Inputs, outputs and log sums are kept, and the backward computes the weights again: nothing of size T * E is kept.

    Args:
        q_BTHK: queries.
        k_BEGK: keys of the entries.
        v_BEGV: values of the entries.
        windows: the windows that entries stand for.
        scale: factor of the scores.

    Returns:
        Outputs [B, T, H, V] in the dtype of the values, and the logarithm of the sum of exponentials [B, T, H] in fp32
        at least, -inf where there is no entry.
    """
    batch, groups = k_BEGK.shape[0], k_BEGK.shape[2]
    q_BTGRK = q_BTHK.unflatten(2, (groups, -1))
    if torch.compiler.is_dynamo_compiling():
        o_BTGRV, lse_BTGR = _as_formula(q_BTGRK, k_BEGK, v_BEGV, windows, scale)
        return o_BTGRV.flatten(2, 3).to(v_BEGV.dtype), lse_BTGR.flatten(2)
    heads_first = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTGRK, k_BEGK, v_BEGV))
    found = _EntryAttention.apply(*heads_first, windows, scale)
    o_BTHV, lse_BTH = (x.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3) for x in found)
    return o_BTHV, lse_BTH


def _as_formula(q_BTGRK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, windows: EntryWindows,
                scale: float) -> tuple[Tensor, Tensor]:
    """The definition, in operations that torch.compile takes apart: outputs [B, T, G, R, V] and log sums."""
    with torch.autocast(q_BTGRK.device.type, enabled=False):
        dots = torch.einsum("btgrk,begk->btgre", wide(q_BTGRK) * scale, wide(k_BEGK))
        score, unread, none = visible_scores(dots, windows, slice(None))
        p_BTGRE = torch.softmax(score, -1).masked_fill(unread, 0.0)
        o_BTGRV = torch.einsum("btgre,begv->btgrv", p_BTGRE, wide(v_BEGV))
        return o_BTGRV, score.logsumexp(-1).masked_fill(none, -torch.inf)


class _EntryAttention(torch.autograd.Function):
    """Attention of rows X = B * G, each with one key head and R query heads."""

    @staticmethod
    def forward(ctx: Any, q_XTRK: Tensor, k_XEK: Tensor, v_XEV: Tensor, windows: EntryWindows,
                scale: float) -> tuple[Tensor, Tensor]:
        shape = q_XTRK.shape[:3]
        dtype = torch.promote_types(q_XTRK.dtype, torch.float32)
        o_XTRV = q_XTRK.new_zeros(*shape, v_XEV.shape[2], dtype=dtype)
        lse_XTR = q_XTRK.new_full(shape, -torch.inf, dtype=dtype)
        with torch.autocast(q_XTRK.device.type, enabled=False):
            k, v = wide(k_XEK) * scale, wide(v_XEV)
            for span in _spans(q_XTRK, windows):
                p_XMC, total_XM1, most_XM1 = _weigh(q_XTRK, k, windows, span)
                o_XMV = torch.bmm(p_XMC, v[:, span.entries])
                o_XMV /= total_XM1.masked_fill(total_XM1 == 0, 1.0)
                o_XTRV[:, span.queries] = o_XMV.unflatten(1, (-1, shape[2]))
                lse_XTR[:, span.queries] = total_XM1.log_().add_(most_XM1).view(shape[0], -1, shape[2])
        ctx.save_for_backward(q_XTRK, k_XEK, v_XEV, o_XTRV, lse_XTR)
        ctx.windows, ctx.scale = windows, scale
        return o_XTRV.to(v_XEV.dtype), lse_XTR

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do_XTRV: Tensor, dlse_XTR: Tensor) -> tuple[Tensor | None, ...]:
        q_XTRK, k_XEK, v_XEV, o_XTRV, lse_XTR = ctx.saved_tensors
        k, v, do_XTRV = wide(k_XEK) * ctx.scale, wide(v_XEV), wide(do_XTRV)
        delta_XTR = (do_XTRV * o_XTRV).sum(-1) - dlse_XTR  # ds = p (do . v - delta)
        safe_XTR = lse_XTR.masked_fill(lse_XTR == -torch.inf, torch.inf)  # exp(score - inf) = 0 where nothing is seen
        dq_XTRK = torch.zeros_like(q_XTRK, dtype=o_XTRV.dtype)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for span in _spans(q_XTRK, ctx.windows):
            rows, seen = span.queries, span.entries
            q_XMK, do_XMV = wide(q_XTRK[:, rows]).flatten(1, 2), do_XTRV[:, rows].flatten(1, 2)
            p_XMC = torch.bmm(q_XMK, k[:, seen].transpose(1, 2)).sub_(safe_XTR[:, rows].flatten(1)[..., None]).exp_()
            _hide(p_XMC, ctx.windows, span, 0.0)
            ds_XMC = torch.bmm(do_XMV, v[:, seen].transpose(1, 2)).sub_(delta_XTR[:, rows].flatten(1)[..., None])
            ds_XMC *= p_XMC
            dv[:, seen] += torch.bmm(p_XMC.transpose(1, 2), do_XMV)
            dk[:, seen] += torch.bmm(ds_XMC.transpose(1, 2), q_XMK)
            dq_XTRK[:, rows] = torch.bmm(ds_XMC, k[:, seen]).view_as(dq_XTRK[:, rows])
        dk *= ctx.scale
        return dq_XTRK.to(q_XTRK.dtype), dk.to(k_XEK.dtype), dv.to(v_XEV.dtype), None, None


@torch.no_grad()
def entry_weights(q_BTHK: Tensor, k_BEGK: Tensor, windows: EntryWindows, rows: slice, scale: float) -> Tensor:
    """Softmax weights of all entries, summed over the query heads of each key head, without a gradient.

    Args:
        q_BTHK: queries.
        k_BEGK: keys of the entries.
        windows: the windows that entries stand for.
        rows: the queries whose weights are wanted.
        scale: factor of the scores.

    Returns:
        Weights [B, Q, G, E] in fp32 at least; zeros for entries that a query does not see.
    """
    batch, number, groups = k_BEGK.shape[:3]
    heads_first = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTHK.unflatten(2, (groups, -1)), k_BEGK))
    with torch.autocast(q_BTHK.device.type, enabled=False):
        q_XTRK, k = heads_first
        k = wide(k) * scale
        weight_XQE = k.new_zeros(k.shape[0], rows.stop - rows.start, number)
        for span in _spans(q_XTRK, windows, rows):
            p_XMC, total_XM1, _ = _weigh(q_XTRK, k, windows, span)
            p_XMC /= total_XM1.masked_fill_(total_XM1 == 0, 1.0)
            queries = slice(span.queries.start - rows.start, span.queries.stop - rows.start)
            weight_XQE[:, queries, span.entries] = p_XMC.unflatten(1, (-1, q_XTRK.shape[2])).sum(2)
    return weight_XQE.unflatten(0, (batch, groups)).transpose(1, 2)


def _spans(q_XTRK: Tensor, windows: EntryWindows, rows: slice | None = None) -> Iterator[EntrySpan]:
    """Pieces of the queries, of all or of some, whose scores stay within the limit of the device.

    Those that see no entry are left out.
    """
    small = q_XTRK.device.type == "cpu" and not torch.compiler.is_dynamo_compiling()  # each piece makes a graph longer
    most = CPU_PIECE_ELEMENTS if small else GPU_PIECE_ELEMENTS
    size = max(MIN_QUERIES, most // max(1, q_XTRK.shape[0] * q_XTRK.shape[2] * windows.number))
    first, last = (0, q_XTRK.shape[1]) if rows is None else (rows.start, rows.stop)
    for start in range(first, last, size):
        span = windows.span(slice(start, min(start + size, last)))
        if span.entries.start < span.entries.stop:
            yield span


def _weigh(q_XTRK: Tensor, k_XEK: Tensor, windows: EntryWindows, span: EntrySpan) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials [X, Q R, C] relative to the largest score, their sums, and that score (0 where nothing is seen)."""
    p_XMC = torch.bmm(wide(q_XTRK[:, span.queries]).flatten(1, 2), k_XEK[:, span.entries].transpose(1, 2))
    _hide(p_XMC, windows, span, -torch.inf)
    most_XM1 = p_XMC.amax(-1, keepdim=True)
    most_XM1.masked_fill_(most_XM1 == -torch.inf, 0.0)
    total_XM1 = p_XMC.sub_(most_XM1).exp_().sum(-1, keepdim=True)
    return p_XMC, total_XM1, most_XM1


def _hide(score_XMC: Tensor, windows: EntryWindows, span: EntrySpan, fill: float) -> None:
    """Fill in place what is not seen, in the entries that some queries of the span see and some do not."""
    for entries in span.mixed:
        seen_BQC = windows.visible(span.queries, entries)
        columns = slice(entries.start - span.entries.start, entries.stop - span.entries.start)
        score_BGQRC = score_XMC.view(len(seen_BQC), -1, seen_BQC.shape[1], score_XMC.shape[1] // seen_BQC.shape[1],
                                     score_XMC.shape[2])
        score_BGQRC[..., columns].masked_fill_(~seen_BQC[:, None, :, None], fill)


def window_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int, seq: SequenceInfo,
                     sinks_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attend to the last `window` tokens of each query's document, its own included.

    Args:
        q_BTHK: queries, the last T of the S tokens.
        k_BSGK: keys of the window and of any tokens before it, those of `seq.history` where rows are divided.
        v_BSGV: their values.
        window: tokens of the window.
        seq: borders of the documents.
        sinks_H: logits that take part in the softmax and carry no value.

    Returns:
        Outputs [B, T, H, V], and the logarithm of the sum of exponentials, sinks included, [B, T, H].
    """
    nothing = torch.full((*q_BTHK.shape[:2], 1, 0), -1, device=q_BTHK.device)
    return selected_attention(q_BTHK, k_BSGK, v_BSGV, nothing, window=window, sinks_H=sinks_H,
                              cu_seqlens=seq.history_borders)


def join_attention(o_BTHV: Tensor, lse_BTH: Tensor, other_BTHV: Tensor, other_lse_BTH: Tensor) -> Tensor:
    """Join attention to two sets of keys into that of one softmax over both.

    Args:
        o_BTHV: outputs over the first set, which must not be empty.
        lse_BTH: logarithm of the sum of its exponentials, sinks included.
        other_BTHV: outputs over the second set.
        other_lse_BTH: likewise; -inf where the set is empty.

    Returns:
        Outputs [B, T, H, V] in the dtype of the first ones.

    >>> one, two = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    >>> equal = torch.zeros(1, 1, 1)
    >>> join_attention(one, equal, two, equal).item()
    0.5
    """
    difference_BTH1 = (lse_BTH - other_lse_BTH)[..., None]
    joined = difference_BTH1.sigmoid() * o_BTHV + (-difference_BTH1).sigmoid() * other_BTHV
    return joined.to(o_BTHV.dtype)
