"""Causal softmax attention with all scores in memory.

B rows, T queries, S keys, H query heads, G key/value heads, r = H/G, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [T, S]: key s <= position of query t, and among its last `window` keys. Queries are the last T."""
    t_T1 = torch.arange(keys - queries, keys, device=device)[:, None]
    s_S = torch.arange(keys, device=device)
    mask_TS = s_S <= t_T1
    return mask_TS if window is None else mask_TS & (s_S > t_T1 - window)


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float | None = None,
              window: int | None = None, sinks_H: Tensor | None = None,
              cu_seqlens: CuSeqlens | None = None) -> Tensor:
    """o_t = sum_s p_ts v_s with p = softmax over the visible keys and, when given, one sink logit per head."""
    batch, queries, heads, dim = q_BTHK.shape
    keys, groups = k_BSGK.shape[1:3]
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    q_BHTK = q_BTHK.to(wide).transpose(1, 2)
    k_BHSK = k_BSGK.to(wide).transpose(1, 2).repeat_interleave(heads // groups, 1)
    v_BHSV = v_BSGV.to(wide).transpose(1, 2).repeat_interleave(heads // groups, 1)
    mask_BTS = visible(queries, keys, window, q_BTHK.device).expand(batch, queries, keys)
    if cu_seqlens is not None:
        document_BT = cu_seqlens.document_ids().view(batch, queries)
        mask_BTS = mask_BTS & (document_BT[:, :, None] == document_BT[:, None, :])
    score_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    score_BHTS = score_BHTS.masked_fill(~mask_BTS[:, None], -torch.inf)
    if sinks_H is not None:
        sink_BHT1 = sinks_H.to(wide)[None, :, None, None].expand(batch, heads, queries, 1)
        score_BHTS = torch.cat([score_BHTS, sink_BHT1], -1)
    p_BHTS = torch.softmax(score_BHTS, -1)[..., :keys]
    return (p_BHTS @ v_BHSV).transpose(1, 2).to(v_BSGV.dtype)
