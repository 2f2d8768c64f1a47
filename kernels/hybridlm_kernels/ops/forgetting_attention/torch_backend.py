"""Forgetting attention in blocks of queries, with a backward that computes the scores again.

Only q, k, v, the gates, the outputs and one number per query and head are kept. F_t = g_1 + ... + g_t is summed in
fp64. The bias F_t - F_s is subtracted in fp64 inside a block; to earlier keys it is split at the first query b of the
block, (F_t - F_b) + (F_b - F_s), two numbers that are small where the key has weight.

B rows, T queries, S keys, H query heads, G key/value heads, R = H / G, K key dim, V value dim, Q queries of a block,
W keys that a block sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward, wide

BLOCK_QUERIES = 128
LOWEST_LOG_GATE = -1e4  # forgets everything; a lower one would only cost bits of the sums


def forgetting_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, g_BSH: Tensor, scale: float,
                         window: int | None, cu_seqlens: CuSeqlens | None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""

    def rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return _ForgettingAttention.apply(q, k, v, g, scale, window)

    if cu_seqlens is not None and cu_seqlens.num_documents > q_BTHK.shape[0]:
        return each_document_row(rows, (q_BTHK, k_BSGK, v_BSGV, g_BSH), cu_seqlens)
    return rows(q_BTHK, k_BSGK, v_BSGV, g_BSH)


class _ForgettingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, window: int | None) -> Tensor:
        blocks = _Blocks(q, k, v, g, scale, window)
        o_BHTV = blocks.v.new_empty(blocks.B, blocks.H, blocks.T, v.shape[-1])
        lse_BHT = blocks.v.new_empty(blocks.B, blocks.H, blocks.T)
        for queries, keys in blocks.ranges():
            score_BHQW = blocks.scores(queries, keys)
            lse_BHQ = score_BHQW.logsumexp(-1)
            lse_BHT[:, :, queries] = lse_BHQ
            p_BHQW = score_BHQW.sub_(lse_BHQ[..., None]).exp_()
            o_BHTV[:, :, queries] = blocks.by_group(blocks.rows(p_BHQW) @ blocks.v[:, :, keys])
        o = o_BHTV.transpose(1, 2).to(v.dtype)
        ctx.save_for_backward(q, k, v, g, o, lse_BHT)
        ctx.options = scale, window
        return o

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, o, lse_BHT = ctx.saved_tensors
        blocks = _Blocks(q, k, v, g, *ctx.options)
        do_BHTV = wide(do).transpose(1, 2)
        mean_BHT = (do_BHTV * wide(o).transpose(1, 2)).sum(-1)
        dq_BHTK = blocks.v.new_empty(blocks.B, blocks.H, blocks.T, q.shape[-1])
        dk_BGSK, dv_BGSV = torch.zeros_like(blocks.k), torch.zeros_like(blocks.v)
        dF_BHS = torch.zeros_like(blocks.F)
        for queries, keys in blocks.ranges():
            p_BHQW = blocks.scores(queries, keys).sub_(lse_BHT[:, :, queries, None]).exp_()
            do_BGrV = blocks.rows(do_BHTV[:, :, queries])
            dv_BGSV[:, :, keys] += blocks.rows(p_BHQW).mT @ do_BGrV
            dp_BHQW = blocks.by_group(do_BGrV @ blocks.v[:, :, keys].mT)
            ds_BHQW = dp_BHQW.sub_(mean_BHT[:, :, queries, None]).mul_(p_BHQW)
            # Rows of ds sum to zero but for rounding, which both sides together cancel.
            dF_BHS[:, :, keys] -= ds_BHQW.sum(2, dtype=torch.float64)
            dF_BHS[:, :, blocks.positions(queries)] += ds_BHQW.sum(3, dtype=torch.float64)
            ds_BGrW = blocks.rows(ds_BHQW)
            dq_BHTK[:, :, queries] = blocks.by_group(ds_BGrW @ blocks.k[:, :, keys]) * blocks.scale
            dk_BGSK[:, :, keys] += ds_BGrW.mT @ blocks.rows(blocks.q[:, :, queries]) * blocks.scale
        dg = None
        if ctx.needs_input_grad[3]:
            dg_BHS = dF_BHS.flip(-1).cumsum(-1).flip(-1)
            dg = torch.where(g < LOWEST_LOG_GATE, 0.0, dg_BHS.transpose(1, 2)).to(g.dtype)
        dq, dk, dv = (x.transpose(1, 2).to(like.dtype) for x, like in ((dq_BHTK, q), (dk_BGSK, k), (dv_BGSV, v)))
        return dq, dk, dv, dg, None, None


class _Blocks:
    """Inputs by head, and the scores of a block of queries."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, window: int | None):
        self.B, self.T, self.H, _ = q.shape
        self.S, self.G = k.shape[1:3]
        self.q, self.k, self.v = (wide(x).transpose(1, 2).contiguous() for x in (q, k, v))
        self.F = g.transpose(1, 2).double().clamp(min=LOWEST_LOG_GATE).cumsum(-1)  # [B, H, S]
        self.scale, self.window = scale, window

    def ranges(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries, each with the keys that one of its queries sees."""
        for start in range(0, self.T, BLOCK_QUERIES):
            queries = slice(start, min(start + BLOCK_QUERIES, self.T))
            positions = self.positions(queries)
            first = 0 if self.window is None else max(0, positions.start - self.window + 1)
            yield queries, slice(first, positions.stop)

    def positions(self, queries: slice) -> slice:
        """The positions of queries among the keys."""
        past = self.S - self.T
        return slice(past + queries.start, past + queries.stop)

    def rows(self, x_BHQX: Tensor) -> Tensor:
        """The heads of a group one below the other: [B, G, R Q, X]."""
        return x_BHQX.reshape(self.B, self.G, -1, x_BHQX.shape[-1])

    def by_group(self, x_BGrX: Tensor) -> Tensor:
        """The reverse of `rows`: [B, H, Q, X]."""
        return x_BGrX.reshape(self.B, self.H, -1, x_BGrX.shape[-1])

    def scores(self, queries: slice, keys: slice) -> Tensor:
        """Scores of the block [B, H, Q, W], -inf where a key is not seen."""
        score_BHQW = self.by_group(self.rows(self.q[:, :, queries] * self.scale) @ self.k[:, :, keys].mT)
        positions = self.positions(queries)
        F_BHQ = self.F[:, :, positions]
        first_BH1, earlier = F_BHQ[:, :, :1], positions.start - keys.start
        dtype = score_BHQW.dtype
        score_BHQW[..., :earlier] += (F_BHQ - first_BH1).to(dtype)[..., None]
        score_BHQW[..., :earlier] += (first_BH1 - self.F[:, :, keys][:, :, :earlier]).to(dtype)[:, :, None]
        score_BHQW[..., earlier:] += (F_BHQ[..., None] - F_BHQ[:, :, None]).to(dtype)
        t_Q1 = torch.arange(positions.start, positions.stop, device=self.q.device)[:, None]
        s_W = torch.arange(keys.start, keys.stop, device=self.q.device)
        hidden_QW = s_W > t_Q1
        if self.window is not None:
            hidden_QW |= s_W <= t_Q1 - self.window
        return score_BHQW.masked_fill_(hidden_QW, -torch.inf)
