"""Causal attention on PyTorch's fused scaled_dot_product_attention, reading only keys that may be visible.

B rows, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim;
N tokens of all rows, P slots in a buffer of padded documents, Q queries of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.ops.attention.reference import visible
from hybridlm_kernels.packing import CuSeqlens

MASKED_BLOCK_QUERIES = 256  # queries per block where the mask is a tensor


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float | None = None,
              window: int | None = None, sinks_H: Tensor | None = None,
              cu_seqlens: CuSeqlens | None = None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None and cu_seqlens.num_documents > q_BTHK.shape[0]:
        return _packed(q_BTHK, k_BSGK, v_BSGV, scale, window, sinks_H, cu_seqlens)
    return _rows(q_BTHK, k_BSGK, v_BSGV, scale, window, sinks_H)


def _rows(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, window: int | None,
          sinks_H: Tensor | None) -> Tensor:
    """Attention where every row is one document."""
    queries, keys = q_BTHK.shape[1], k_BSGK.shape[1]
    if window is not None and keys > queries + window - 1:  # no query sees the first keys
        k_BSGK, v_BSGV = k_BSGK[:, 1 - queries - window :], v_BSGV[:, 1 - queries - window :]
        keys = queries + window - 1
    if window is None or window >= keys:
        if queries in (1, keys):
            return _softmax_attention(q_BTHK, k_BSGK, v_BSGV, scale, sinks_H, queries > 1)
        window = None
    if window is not None and keys == queries and queries > 2 * _band_block(window):
        return _banded(q_BTHK, k_BSGK, v_BSGV, scale, window, sinks_H)
    if queries == 1:
        return _softmax_attention(q_BTHK, k_BSGK, v_BSGV, scale, sinks_H)
    out = []
    for start in range(0, queries, MASKED_BLOCK_QUERIES):
        stop = min(start + MASKED_BLOCK_QUERIES, queries)
        last = keys - queries + stop
        first = 0 if window is None else max(0, keys - queries + start - window + 1)
        mask_QS = visible(stop - start, last - first, window, q_BTHK.device)
        out.append(_softmax_attention(q_BTHK[:, start:stop], k_BSGK[:, first:last], v_BSGV[:, first:last],
                                      scale, sinks_H, mask_QS=mask_QS))
    return torch.cat(out, 1) if len(out) > 1 else out[0]


def _softmax_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, sinks_H: Tensor | None,
                       causal: bool = False, mask_QS: Tensor | None = None) -> Tensor:
    """Attention by the fused kernel; `causal` needs T == S."""
    v_dim = v_BSGV.shape[-1]
    if sinks_H is not None:
        q_BTHK, k_BSGK, v_BSGV = _add_sink(q_BTHK, k_BSGK, v_BSGV, scale, sinks_H, causal)
        mask_QS = F.pad(mask_QS, (1, 0), value=True) if mask_QS is not None else None
    # the fused kernels want one head dim; otherwise all scores would be written to memory
    widest = max(q_BTHK.shape[-1], v_BSGV.shape[-1])
    q_BTHK, k_BSGK, v_BSGV = (
        F.pad(x, (0, widest - x.shape[-1])) if x.shape[-1] < widest else x for x in (q_BTHK, k_BSGK, v_BSGV))
    o_BHTV = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2), attn_mask=mask_QS,
        is_causal=causal, scale=scale, enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2])
    o_BTHV = o_BHTV.transpose(1, 2)
    if sinks_H is not None and causal:
        o_BTHV = o_BTHV[:, 1:]
    return o_BTHV if widest == v_dim else o_BTHV[..., :v_dim]


def _add_sink(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, sinks_H: Tensor,
              causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a first key whose score is the head's sink logit and whose value is zero.

    8 more dims (the kernels like multiples of 8) carry the logit in q and a 1 in that key; the logit is split
    in two so that half precision loses none of it. With `causal` a first query keeps the mask square.
    """
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    logit_H = sinks_H.to(wide) / scale
    high_H = logit_H.to(q_BTHK.dtype)
    low_H = (logit_H - high_H.to(wide)).detach().to(q_BTHK.dtype)
    extra_H8 = F.pad(torch.stack([high_H, low_H], -1), (0, 6))
    q_BTHK = torch.cat([q_BTHK, extra_H8.expand(*q_BTHK.shape[:3], 8)], -1)
    if causal:
        q_BTHK = F.pad(q_BTHK, (0, 0, 0, 0, 1, 0))
    batch, _, groups, dim = k_BSGK.shape
    sink_K = torch.cat([k_BSGK.new_zeros(dim), k_BSGK.new_ones(2), k_BSGK.new_zeros(6)])
    k_BSGK = torch.cat([sink_K.expand(batch, 1, groups, dim + 8), F.pad(k_BSGK, (0, 8))], 1)
    return q_BTHK, k_BSGK, F.pad(v_BSGV, (0, 0, 0, 0, 1, 0))


def _band_block(window: int) -> int:
    """Queries of a block in `_banded`: a block reads two earlier ones, so they must span the window."""
    return max(32, window // 2)


def _banded(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, window: int,
            sinks_H: Tensor | None) -> Tensor:
    """A window much shorter than the row: every block of Q queries against its own and the two blocks before."""
    batch, length = q_BTHK.shape[:2]
    size = _band_block(window)
    head = 2 * size
    blocks = -(-(length - head) // size)
    missing = head + blocks * size - length  # later than every real query, hence never visible to one
    first = _softmax_attention(q_BTHK[:, :head], k_BSGK[:, :head], v_BSGV[:, :head], scale, sinks_H,
                               mask_QS=visible(head, head, window, q_BTHK.device))
    q_BTHK, k_BSGK, v_BSGV = (
        F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x for x in (q_BTHK, k_BSGK, v_BSGV))

    def with_earlier(x_BSGX: Tensor) -> Tensor:
        x_BNQGX = x_BSGX.unflatten(1, (blocks + 2, size))
        return torch.cat([x_BNQGX[:, :-2], x_BNQGX[:, 1:-1], x_BNQGX[:, 2:]], 2).flatten(0, 1)

    banded = _softmax_attention(
        q_BTHK[:, head:].reshape(batch * blocks, size, *q_BTHK.shape[2:]), with_earlier(k_BSGK),
        with_earlier(v_BSGV), scale, sinks_H, mask_QS=visible(size, 3 * size, window, q_BTHK.device))
    banded = banded.reshape(batch, blocks * size, *banded.shape[2:])
    return torch.cat([first, banded[:, : length - head]], 1)


def _packed(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, window: int | None,
            sinks_H: Tensor | None, cu_seqlens: CuSeqlens) -> Tensor:
    """Attention of packed documents: those of about one length are the rows of one call.

    Padding at their end needs no mask, because it comes after every token that counts.
    """
    buckets = _Buckets.of(cu_seqlens)
    q, k, v = (_ToBuckets.apply(x.flatten(0, 1), buckets).split(buckets.sizes) for x in (q_BTHK, k_BSGK, v_BSGV))
    out = []
    for i, shape in enumerate(buckets.shapes):
        q_i, k_i, v_i = (x[i].unflatten(0, shape) for x in (q, k, v))
        out.append(_rows(q_i, k_i, v_i, scale, window, sinks_H).flatten(0, 1))
    o_NHV = _FromBuckets.apply(torch.cat(out) if len(out) > 1 else out[0], buckets)
    return o_NHV.unflatten(0, q_BTHK.shape[:2])


class _Buckets:
    """Documents grouped by length, those of a group padded to its longest (by an eighth at most, or 15)."""

    def __init__(self, cu_seqlens: CuSeqlens):
        groups: dict[int, list[tuple[int, int]]] = {}
        for start, stop in zip(cu_seqlens.host, cu_seqlens.host[1:], strict=False):
            step = max(16, (1 << (stop - start).bit_length()) // 16)
            groups.setdefault((stop - start - 1) // step * step, []).append((start, stop))
        self.shapes = [(len(group), max(b - a for a, b in group)) for _, group in sorted(groups.items())]
        self.sizes = [count * length for count, length in self.shapes]
        row_P = torch.zeros(sum(self.sizes), dtype=torch.int64)
        slot_N = torch.empty(cu_seqlens.num_tokens, dtype=torch.int64)
        real_P = torch.zeros(len(row_P), dtype=torch.bool)
        slot = 0
        for (_, length), (_, group) in zip(self.shapes, sorted(groups.items()), strict=True):
            for start, stop in group:
                torch.arange(start, stop, out=row_P[slot : slot + stop - start])
                torch.arange(slot, slot + stop - start, out=slot_N[start:stop])
                real_P[slot : slot + stop - start] = True
                slot += length
        self.row_P = row_P.to(cu_seqlens.device)  # the token in each slot; 0 in padding
        self.padding = (~real_P).nonzero()[:, 0].to(cu_seqlens.device)  # the slots without a token
        self.slot_N = slot_N.to(cu_seqlens.device)  # the slot of each token

    @classmethod
    def of(cls, cu_seqlens: CuSeqlens) -> _Buckets:
        if "attention_buckets" not in cu_seqlens.cache:
            cu_seqlens.cache["attention_buckets"] = cls(cu_seqlens)
        return cu_seqlens.cache["attention_buckets"]

    def fill(self, x_NX: Tensor) -> Tensor:
        """Tokens in their slots, zeros in padding."""
        y_PX = x_NX.index_select(0, self.row_P)
        return y_PX.index_fill_(0, self.padding, 0.0) if len(self.padding) else y_PX


class _ToBuckets(torch.autograd.Function):
    """Copies tokens to their slots; the gradient is a gather too, where autograd's own would add rows one by one."""

    @staticmethod
    def forward(ctx, x_NX: Tensor, buckets: _Buckets) -> Tensor:
        ctx.buckets = buckets
        return buckets.fill(x_NX)

    @staticmethod
    def backward(ctx, dy_PX):
        return dy_PX.index_select(0, ctx.buckets.slot_N), None


class _FromBuckets(torch.autograd.Function):
    """Copies slots back to their tokens, the reverse of `_ToBuckets`."""

    @staticmethod
    def forward(ctx, y_PX: Tensor, buckets: _Buckets) -> Tensor:
        ctx.buckets = buckets
        return y_PX.index_select(0, buckets.slot_N)

    @staticmethod
    def backward(ctx, dx_NX):
        return ctx.buckets.fill(dx_NX), None
