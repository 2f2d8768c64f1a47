"""Attention over listed tokens or blocks and a window, with all scores in memory.

B rows, T queries, S keys, W keys of a window of its own, H query heads, G key/value heads, U lists per query, N units
per list, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens


def selected_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTUN: Tensor, scale: float,
                       block: int | None, window: int | None, window_k_BWGK: Tensor | None,
                       window_v_BWGV: Tensor | None, sinks_H: Tensor | None, bias_BTUN: Tensor | None,
                       cu_seqlens: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """o_t = sum_s p_ts v_s with p = softmax over the listed keys, the window and one sink logit; and its log sum."""
    heads = q_BTHK.shape[2]
    listed_BTUS, bias_BTUS = _listed(q_BTHK, k_BSGK, indices_BTUN, block, bias_BTUN, cu_seqlens)
    scores, values = [], []
    own = window_k_BWGK is not None
    if window is not None:
        w_k = k_BSGK if window_k_BWGK is None else window_k_BWGK
        w_v = v_BSGV if window_v_BWGV is None else window_v_BWGV
        near_BTW = _near(q_BTHK, w_k, window, cu_seqlens)
        scores.append(_scores(q_BTHK, w_k, scale).masked_fill(~near_BTW[:, :, None], -torch.inf))
        values.append(w_v)
        if not own:
            listed_BTUS = listed_BTUS & ~near_BTW[:, :, None]
    copies = heads // listed_BTUS.shape[2]
    score_BTHS = _scores(q_BTHK, k_BSGK, scale) + bias_BTUS.repeat_interleave(copies, 2)
    scores.append(score_BTHS.masked_fill(~listed_BTUS.repeat_interleave(copies, 2), -torch.inf))
    values.append(v_BSGV)
    score = torch.cat(scores, -1)
    if sinks_H is not None:
        score = torch.cat([score, sinks_H.to(score.dtype)[:, None].expand(*score.shape[:3], 1)], -1)
    empty_BTH1 = (score == -torch.inf).all(-1, keepdim=True)
    lse_BTH = torch.logsumexp(score.masked_fill(empty_BTH1, 0.0), -1).masked_fill(empty_BTH1[..., 0], -torch.inf)
    p = (score - lse_BTH.masked_fill(empty_BTH1[..., 0], 0.0)[..., None]).exp()
    v = torch.cat([x.to(p.dtype).repeat_interleave(heads // x.shape[2], 2) for x in values], 1)
    return torch.einsum("bths,bshv->bthv", p[..., : v.shape[1]], v).to(v_BSGV.dtype), lse_BTH


def _scores(q_BTHK: Tensor, k_BSGK: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    k_BSHK = k_BSGK.to(wide).repeat_interleave(q_BTHK.shape[2] // k_BSGK.shape[2], 2)
    return scale * torch.einsum("bthk,bshk->bths", q_BTHK.to(wide), k_BSHK)


def _document_places(batch: int, queries: int, keys: int, cu_seqlens: CuSeqlens | None,
                     device: torch.device) -> tuple[Tensor, Tensor]:
    """Position of each query in its row [T], and the first token of its document [B, T]."""
    position_T = torch.arange(keys - queries, keys, device=device)
    if cu_seqlens is None:
        return position_T, torch.zeros(batch, queries, dtype=torch.int64, device=device)
    return position_T, cu_seqlens.first_keys(batch, queries)


def _listed(q_BTHK: Tensor, k_BSGK: Tensor, indices_BTUN: Tensor, block: int | None, bias_BTUN: Tensor | None,
            cu_seqlens: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """Whether each key is listed, and the bias of its unit: [B, T, U, S]."""
    batch, queries = q_BTHK.shape[:2]
    keys = k_BSGK.shape[1]
    s_S = torch.arange(keys, device=q_BTHK.device)
    unit_BTS = s_S.expand(batch, queries, keys)
    seen_BTS = torch.ones_like(unit_BTS, dtype=torch.bool)
    if block is not None:
        position_T, first_BT = _document_places(batch, queries, keys, cu_seqlens, q_BTHK.device)
        unit_BTS = (s_S - first_BT[..., None]).div(block, rounding_mode="floor")
        seen_BTS = (s_S >= first_BT[..., None]) & (s_S <= position_T[:, None])
    match_BTUNS = (indices_BTUN[..., None] == unit_BTS[:, :, None, None]) & seen_BTS[:, :, None, None]
    match_BTUNS = match_BTUNS & (indices_BTUN >= 0)[..., None]
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    if bias_BTUN is None:
        return match_BTUNS.any(3), torch.zeros((*match_BTUNS.shape[:3], keys), dtype=wide, device=q_BTHK.device)
    return match_BTUNS.any(3), torch.where(match_BTUNS, bias_BTUN.to(wide)[..., None], 0.0).sum(3)


def _near(q_BTHK: Tensor, k_BWGK: Tensor, window: int, cu_seqlens: CuSeqlens | None) -> Tensor:
    """Whether each key is in the window of each query: [B, T, W]."""
    (batch, queries), keys = q_BTHK.shape[:2], k_BWGK.shape[1]
    position_T, first_BT = _document_places(batch, queries, keys, cu_seqlens, q_BTHK.device)
    s_W = torch.arange(keys, device=q_BTHK.device)
    return ((s_W <= position_T[:, None]) & (s_W > position_T[:, None] - window)) & (s_W >= first_BT[..., None])
