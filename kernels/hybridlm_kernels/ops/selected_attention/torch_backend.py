"""Attention over listed tokens or blocks and a window, in pieces of queries; memory grows with T and S, not with T * S.

Key heads become rows: a row has one key head and R query heads, or one query head where each has a list of its own.
Several rows may read one key head, `key_row` says which.

X rows, F rows of keys, T queries, S keys, W keys of the window, R query heads per row, K/V key/value dim, N units per
list; M queries of a piece (X' rows by Q queries, flattened).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm_kernels.ops.selected_attention.listed_parts import (
    AttentionPart,
    GatheredTokens,
    Gradients,
    ListedBlocks,
    WindowBands,
)
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward

CPU_PIECE_ELEMENTS = 2**20  # copied keys and scores of a piece: near the cache, and enough work for one operation
CPU_SLOT_ELEMENTS = 2**23  # outputs of the queries of a piece for each block that they list, at most
CPU_ROW_ELEMENTS = 2**21  # and of a piece of several whole rows, which shares nothing between them
GPU_PIECE_ELEMENTS = 2**26
MIN_QUERIES = 16  # of a piece


@dataclass(eq=False)
class Layout:
    """The keys that each query may read, apart from the lists.

    Args:
        scale: factor on the scores.
        block: tokens per unit; None: units are keys.
        window: keys of the window; None: none.
        own_window: the window has keys of its own.
        key_row_X: the row of keys that each row reads.
        first_XT: first token of each query's document, in its row.
        offset: place of the first query in its row.
    """

    scale: float
    block: int | None
    window: int | None
    own_window: bool
    key_row_X: Tensor
    first_XT: Tensor
    offset: int


def selected_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTUN: Tensor, scale: float,
                       block: int | None, window: int | None, window_k_BWGK: Tensor | None,
                       window_v_BWGV: Tensor | None, sinks_H: Tensor | None, bias_BTUN: Tensor | None,
                       cu_seqlens: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    batch, queries, heads = q_BTHK.shape[:3]
    groups, device = k_BSGK.shape[2], q_BTHK.device
    lists = heads if indices_BTUN.shape[2] == heads else groups  # rows per row of the batch
    per_row = heads // lists

    def fold(x_BTC: Tensor, copies: int = 1) -> Tensor:
        """[B, T, C, ...] to [B * C, T, ...]."""
        x = x_BTC.transpose(1, 2)
        return (x if copies == 1 else x.expand(-1, copies, *x.shape[2:])).flatten(0, 1)

    q_XTRK = fold(q_BTHK.unflatten(2, (lists, per_row)))
    k_FSK, v_FSV = fold(k_BSGK), fold(v_BSGV)
    window_k, window_v = (None if x is None else fold(x) for x in (window_k_BWGK, window_v_BWGV))
    copies = lists // indices_BTUN.shape[2]
    indices_XTN = fold(indices_BTUN, copies)
    bias_XTN = None if bias_BTUN is None else fold(bias_BTUN, copies)
    sinks_XR = None if sinks_H is None else sinks_H.view(lists, per_row).expand(batch, -1, -1).flatten(0, 1)
    key_row_X = torch.arange(batch * groups, device=device).repeat_interleave(lists // groups)
    keys = (k_FSK if window_k is None else window_k).shape[1]
    first_BT = (torch.zeros(1, 1, dtype=torch.int64, device=device).expand(batch, queries) if cu_seqlens is None
                else cu_seqlens.first_keys(batch, queries))
    layout = Layout(scale, block, window, window_k is not None, key_row_X,
                    first_BT.repeat_interleave(lists, 0), keys - queries)
    o_XTRV, lse_XTR = _SelectedAttention.apply(q_XTRK, k_FSK, v_FSV, window_k, window_v, sinks_XR, bias_XTN,
                                               indices_XTN, layout)
    o_BTHV = o_XTRV.unflatten(0, (batch, lists)).transpose(1, 2).flatten(2, 3)
    return o_BTHV, lse_XTR.unflatten(0, (batch, lists)).transpose(1, 2).flatten(2, 3)


class _SelectedAttention(torch.autograd.Function):
    """Keeps inputs, outputs and the log sums; the backward computes the probabilities again, piece by piece."""

    @staticmethod
    def forward(ctx, q_XTRK, k_FSK, v_FSV, window_k, window_v, sinks_XR, bias_XTN, indices_XTN, layout):
        wide = torch.promote_types(q_XTRK.dtype, torch.float32)
        call = _Pieces(q_XTRK, k_FSK, v_FSV, window_k, window_v, bias_XTN, indices_XTN, layout)
        rows, queries, heads = q_XTRK.shape[:3]
        o_XTRV = torch.empty(rows, queries, heads, v_FSV.shape[-1], dtype=wide, device=q_XTRK.device)
        lse_XTR = torch.empty(rows, queries, heads, dtype=wide, device=q_XTRK.device)
        with torch.autocast(q_XTRK.device.type, enabled=False):
            for row, place in call.pieces():
                o, lse = call.forward(row, place, None if sinks_XR is None else sinks_XR[row].to(wide))
                o_XTRV[row, place], lse_XTR[row, place] = o, lse
        ctx.layout = layout
        ctx.save_for_backward(q_XTRK, k_FSK, v_FSV, window_k, window_v, sinks_XR, bias_XTN, indices_XTN, o_XTRV,
                              lse_XTR)
        return o_XTRV.to(v_FSV.dtype), lse_XTR

    @staticmethod
    @plain_backward
    def backward(ctx, do_XTRV, dlse_XTR):
        q, k, v, window_k, window_v, sinks_XR, bias, indices, o_XTRV, lse_XTR = ctx.saved_tensors
        call = _Pieces(q, k, v, window_k, window_v, bias, indices, ctx.layout)
        do_XTRV = do_XTRV.to(o_XTRV.dtype)
        delta_XTR = (do_XTRV * o_XTRV).sum(-1) - dlse_XTR  # ds = p (do . v - delta)
        safe_XTR = lse_XTR.masked_fill(lse_XTR == -torch.inf, torch.inf)  # exp(score - inf) = 0 where nothing is read
        grads = _Gradients(call)
        for row, place in call.pieces():
            call.backward(row, place, do_XTRV[row, place], delta_XTR[row, place], safe_XTR[row, place], grads)
        d_sinks = None
        if sinks_XR is not None:
            p_XTR = (sinks_XR.to(safe_XTR.dtype)[:, None] - safe_XTR).exp()
            d_sinks = -(p_XTR * delta_XTR).sum(1).to(sinks_XR.dtype)
        found = (grads.q, grads.k, grads.v, grads.window_k, grads.window_v, grads.bias)
        shaped = [None if x is None else grad.view(x.shape).to(x.dtype)
                  for grad, x in zip(found, (q, k, v, window_k, window_v, bias), strict=True)]
        return (*shaped[:5], d_sinks, shaped[5], None, None)


class _Pieces:
    """The pieces of queries of one call."""

    def __init__(self, q_XTRK: Tensor, k_FSK: Tensor, v_FSV: Tensor, window_k: Tensor | None, window_v: Tensor | None,
                 bias_XTN: Tensor | None, indices_XTN: Tensor, layout: Layout):
        self.wide = torch.promote_types(q_XTRK.dtype, torch.float32)
        self.layout, self.q_XTRK, self.bias_XTN, self.indices_XTN = layout, q_XTRK, bias_XTN, indices_XTN
        self.keys = k_FSK.shape[1]
        self.k_ZK, self.v_ZV = (x.flatten(0, 1).to(self.wide) for x in (k_FSK, v_FSV))
        own = window_k is not None and window_v is not None
        self.window_k = window_k.to(self.wide) if own else self.k_ZK.view(k_FSK.shape)  # type: ignore[union-attr]
        self.window_v = window_v.to(self.wide) if own else self.v_ZV.view(v_FSV.shape)  # type: ignore[union-attr]

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Yields (rows, queries): a part of one row, or several whole rows where these are short."""
        rows, queries, heads = self.q_XTRK.shape[:3]
        most, per_query = CPU_SLOT_ELEMENTS, max(self.q_XTRK.shape[3], self.v_ZV.shape[1])
        if self.layout.block is None:
            most, per_query = CPU_PIECE_ELEMENTS, 1 + self.q_XTRK.shape[3]
        if self.q_XTRK.device.type != "cpu":
            most = GPU_PIECE_ELEMENTS
        per_query *= heads * max(1, self.indices_XTN.shape[2])
        fits = max(MIN_QUERIES, most // per_query)
        if fits >= queries:
            if self.q_XTRK.device.type == "cpu":
                most = min(most, CPU_ROW_ELEMENTS)
            step = max(1, most // max(1, per_query * queries))
            for row in range(0, rows, step):
                yield slice(row, min(row + step, rows)), slice(0, queries)
            return
        for row in range(rows):
            for start in range(0, queries, fits):
                yield slice(row, row + 1), slice(start, min(start + fits, queries))

    def parts(self, row: slice, place: slice) -> list[AttentionPart]:
        """The parts of one softmax: what is listed, and the window."""
        layout = self.layout
        position_Q = torch.arange(layout.offset + place.start, layout.offset + place.stop, device=self.q_XTRK.device)
        position_M = position_Q.repeat(row.stop - row.start)
        first_M = layout.first_XT[row, place].flatten()
        last_M = position_M  # last key that a list may name
        if layout.window is not None and not layout.own_window:
            last_M = position_M - layout.window
        lists_MN = self.indices_XTN[row, place].flatten(0, 1).long()
        base_M1 = (layout.key_row_X[row] * self.keys).repeat_interleave(len(position_Q))[:, None]
        heads = self.q_XTRK.shape[2]
        parts: list[AttentionPart] = []
        if lists_MN.shape[1] and layout.block is not None:
            start_MN = first_M[:, None] + lists_MN * layout.block
            limit_MN = (last_M[:, None] - start_MN).clamp_(max=layout.block - 1).masked_fill_(lists_MN < 0, -1)
            parts.append(ListedBlocks(start_MN + base_M1, limit_MN, layout.block, heads, len(self.k_ZK)))
        elif lists_MN.shape[1]:
            absent_MN = lists_MN < 0
            if layout.window is not None and not layout.own_window:
                near_MN = (lists_MN > last_M[:, None]) & (lists_MN <= position_M[:, None])
                absent_MN = absent_MN | (near_MN & (lists_MN >= first_M[:, None]))
            parts.append(GatheredTokens(lists_MN + base_M1, absent_MN))
        if layout.window is not None:
            parts.append(WindowBands(self.window_k, self.window_v, layout.key_row_X[row], position_Q,
                                     first_M.view(-1, len(position_Q)), layout.window, layout.offset + place.start))
        return parts

    def query(self, row: slice, place: slice) -> Tensor:
        """Scaled queries [M, R, K]."""
        return (self.q_XTRK[row, place].to(self.wide) * self.layout.scale).flatten(0, 1)

    def bias(self, row: slice, place: slice, part: AttentionPart) -> Tensor | None:
        """The biases of the units of a piece, [M, N]."""
        if self.bias_XTN is None or not part.is_listed:
            return None
        return self.bias_XTN[row, place].flatten(0, 1).to(self.wide)

    def forward(self, row: slice, place: slice, sinks_XR: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs [X', Q, R, V] and log sums [X', Q, R] of a piece."""
        q_MRK = self.query(row, place)
        shape = (row.stop - row.start, place.stop - place.start, q_MRK.shape[1])
        found = [part.attend(q_MRK, self.k_ZK, self.v_ZV, self.bias(row, place, part))
                 for part in self.parts(row, place)]
        sums = [lse for _, lse in found]
        if sinks_XR is not None:
            sums.append(sinks_XR[:, None].expand(shape).flatten(0, 1))
        if len(sums) == 1:  # a part alone
            return found[0][0].view(*shape, -1), sums[0].view(shape)
        if not sums:
            return q_MRK.new_zeros(*shape, self.v_ZV.shape[1]), q_MRK.new_full(shape, -torch.inf)
        lse_MR = torch.stack(sums).logsumexp(0)
        safe_MR = lse_MR.masked_fill(lse_MR == -torch.inf, torch.inf)
        o_MRV = q_MRK.new_zeros(*q_MRK.shape[:2], self.v_ZV.shape[1])
        for o, lse in found:
            o_MRV += o * (lse - safe_MR).exp_()[..., None]
        return o_MRV.view(*shape, -1), lse_MR.view(shape)

    def backward(self, row: slice, place: slice, do_XQRV: Tensor, delta_XQR: Tensor, lse_XQR: Tensor,
                 grads: _Gradients) -> None:
        """Adds the gradients of a piece."""
        q_MRK = self.query(row, place)
        given = Gradients(do_XQRV.flatten(0, 1), delta_XQR.flatten(0, 1), lse_XQR.flatten(0, 1))
        dq_MRK = torch.zeros_like(q_MRK)
        for part in self.parts(row, place):
            dk, dv = (grads.k, grads.v) if part.is_listed else (grads.window_k, grads.window_v)
            dq, d_bias_MN = part.backward(q_MRK, self.k_ZK, self.v_ZV, self.bias(row, place, part), given, dk, dv)
            dq_MRK += dq
            if d_bias_MN is not None:
                grads.bias[row, place] = d_bias_MN.view(grads.bias[row, place].shape)
        grads.q[row, place] = (dq_MRK * self.layout.scale).view(grads.q[row, place].shape)


class _Gradients:
    """The gradients of one call, which its pieces add up; a window without its own keys adds to those of the keys."""

    def __init__(self, call: _Pieces):
        self.q = torch.zeros(call.q_XTRK.shape, dtype=call.wide, device=call.q_XTRK.device)
        self.k, self.v = torch.zeros_like(call.k_ZK), torch.zeros_like(call.v_ZV)
        own = call.layout.own_window
        self.window_k = torch.zeros_like(call.window_k) if own else self.k.view(call.window_k.shape)
        self.window_v = torch.zeros_like(call.window_v) if own else self.v.view(call.window_v.shape)
        bias_shape = (0,) if call.bias_XTN is None else call.bias_XTN.shape
        self.bias = torch.zeros(bias_shape, dtype=call.wide, device=call.q_XTRK.device)
