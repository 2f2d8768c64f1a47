"""Causal attention on PyTorch's fused scaled_dot_product_attention, reading only keys that may be visible.

B rows, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim, Q queries of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.ops.attention.banded import band_block, banded_by_copies, banded_by_views
from hybridlm_kernels.ops.attention.reference import visible
from hybridlm_kernels.packing import CuSeqlens

MASKED_BLOCK_QUERIES = 256  # queries per block where the mask is a tensor


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float | None = None,
              window: int | None = None, sinks_H: Tensor | None = None,
              cu_seqlens: CuSeqlens | None = None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None and cu_seqlens.num_documents > q_BTHK.shape[0]:
        return each_document_row(lambda q, k, v: _rows(q, k, v, scale, window, sinks_H), (q_BTHK, k_BSGK, v_BSGV),
                                 cu_seqlens)
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
    if window is not None and keys == queries and queries > 2 * band_block(window):
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
    q_BTHK, k_BSGK, v_BSGV = _one_head_dim(q_BTHK, k_BSGK, v_BSGV)
    o_BHTV = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2), attn_mask=mask_QS,
        is_causal=causal, scale=scale, enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2])
    o_BTHV = o_BHTV.transpose(1, 2)
    if sinks_H is not None and causal:
        o_BTHV = o_BTHV[:, 1:]
    return o_BTHV if o_BTHV.shape[-1] == v_dim else o_BTHV[..., :v_dim]


def _one_head_dim(*tensors: Tensor) -> list[Tensor]:
    """Pads the last dims to one: the fused kernels want it; otherwise all scores would be written to memory."""
    widest = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, widest - x.shape[-1])) if x.shape[-1] < widest else x for x in tensors]


def _banded(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, window: int,
            sinks_H: Tensor | None) -> Tensor:
    """A window much shorter than the row."""
    if q_BTHK.device.type == "cpu" and sinks_H is None:
        q, k, v = _one_head_dim(q_BTHK, k_BSGK, v_BSGV)
        o_BTHX = banded_by_views(q, k, v, window, scale)
        return o_BTHX if o_BTHX.shape[-1] == v_BSGV.shape[-1] else o_BTHX[..., : v_BSGV.shape[-1]]
    return banded_by_copies(q_BTHK, k_BSGK, v_BSGV, window, lambda q, k, v, mask_QS: _softmax_attention(
        q, k, v, scale, sinks_H, mask_QS=mask_QS))


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
