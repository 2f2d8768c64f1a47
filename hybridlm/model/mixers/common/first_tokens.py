"""Softmax attention to a window and to the first tokens of each document.

Heads of trained transformers put much of their attention on the first token, for want of anything to read; a window
without it changes them more than the lost context does (Xiao et al. 2023, StreamingLLM).

B rows, T tokens, S keys, F first tokens, W tokens of the window, n blocks of W tokens, X = 2 W keys, H query heads,
G key/value heads, r = H / G, K key dim, V value dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.model.mixers.common.dense_attention import heads_of_all_tokens
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


def window_and_first_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seq: SequenceInfo, *, window: int,
                               first_tokens: int, seen: int | None = None) -> Tensor:
    """Attend to the `window` newest tokens and to the `first_tokens` first ones of the document.

    Work and memory grow with T (W + F), not with T^2.

    Args:
        q_BTHK: queries.
        k_BSGK: keys; with `seen` those that a decode state keeps, the first tokens before all others.
        v_BSGV: values.
        seq: positions and borders of the documents.
        window: keys that a token sees, its own included.
        first_tokens: keys at the start of its document that it sees besides.
        seen: tokens of each row so far, the new ones included, while decoding; None: keys are those of the queries.

    Returns:
        Outputs [B, T, H, V].
    """
    if seen is not None and k_BSGK.shape[1] != q_BTHK.shape[1]:
        return _attend_kept(q_BTHK, k_BSGK, v_BSGV, window, first_tokens, seen)
    shard = seq.shard
    if shard is None:
        return _attend_blocks(q_BTHK, k_BSGK, v_BSGV, seq.positions_BT, window, first_tokens)
    q, k, v = heads_of_all_tokens(shard, [q_BTHK], [k_BSGK, v_BSGV])
    if shard.borders is None:
        positions_BT = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
    else:
        positions_BT = shard.borders.positions().view(q.shape[:2])
    return shard.by_tokens(_attend_blocks(q, k, v, positions_BT, window, first_tokens))


def _attend_blocks(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, positions_BT: Tensor, window: int,
                   first_tokens: int) -> Tensor:
    """Each block of W queries reads its own keys and those of the block before it, and the first tokens."""
    B, T = q_BTHK.shape[:2]
    G = k_BTGK.shape[2]
    W = min(window, T)
    padding = -T % W
    q_BnHWK, k_BnGWK, v_BnGWV = (
        F.pad(wide(x), (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, W)).transpose(2, 3)
        for x in (q_BTHK, k_BTGK, v_BTGV))
    q_BnGrWK = q_BnHWK.unflatten(2, (G, -1)) * q_BTHK.shape[-1] ** -0.5
    k_BnGXK, v_BnGXV = (torch.cat([F.pad(x, (0, 0) * 3 + (1, 0))[:, :-1], x], 3) for x in (k_BnGWK, v_BnGWV))
    near = torch.einsum("bngrwk,bngxk->bngrwx", q_BnGrWK, k_BnGXK)
    query_nW = torch.arange(T + padding, device=q_BTHK.device).view(-1, W)
    key_nX = torch.cat([query_nW - W, query_nW], 1)
    start_BT = torch.arange(T, device=q_BTHK.device) - positions_BT  # of the document, as a place in the row
    start_BnW = torch.cat([start_BT, query_nW.flatten()[T:].expand(B, -1)], 1).view(B, -1, W)
    seen_nWX = (key_nX[:, None] <= query_nW[..., None]) & (key_nX[:, None] > query_nW[..., None] - window)
    seen_BnWX = seen_nWX & (key_nX[:, None] >= start_BnW[..., None])
    near = near.masked_fill(~seen_BnWX[:, :, None, None], -torch.inf)
    # First tokens that the window does not hold already.
    place_F = torch.arange(first_tokens, device=q_BTHK.device)
    taken_BTF = place_F <= (positions_BT - window)[..., None]
    place_BTF = torch.where(taken_BTF, start_BT[..., None] + place_F, 0)
    row_B11 = torch.arange(B, device=q_BTHK.device)[:, None, None]
    k_BTFGK, v_BTFGV = (wide(x)[row_B11, place_BTF] for x in (k_BTGK, v_BTGV))
    q_BTGrK = (wide(q_BTHK) * q_BTHK.shape[-1] ** -0.5).unflatten(2, (G, -1))
    far_BTGrF = torch.einsum("btgrk,btfgk->btgrf", q_BTGrK, k_BTFGK)
    far_BTGrF = far_BTGrF.masked_fill(~taken_BTF[:, :, None, None], -torch.inf)
    near_BTGrX = near.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :T]
    p_BTGrX, p_BTGrF = torch.cat([near_BTGrX, far_BTGrF], -1).softmax(-1).split([2 * W, first_tokens], -1)
    p_BnWGrX = F.pad(p_BTGrX, (0, 0) * 3 + (0, padding)).unflatten(1, (-1, W))
    o_BTGrV = torch.einsum("bnwgrx,bngxv->bnwgrv", p_BnWGrX, v_BnGXV).flatten(1, 2)[:, :T]
    o_BTGrV = o_BTGrV + torch.einsum("btgrf,btfgv->btgrv", p_BTGrF, v_BTFGV)
    return o_BTGrV.flatten(2, 3).to(v_BTGV.dtype)


def _attend_kept(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int, first_tokens: int, seen: int) -> Tensor:
    """Attention to the keys that a decode state keeps: first tokens, then the newest ones."""
    device, kept = q_BTHK.device, k_BSGK.shape[1]
    first = min(first_tokens, kept)
    place_S = torch.cat([torch.arange(first, device=device), torch.arange(seen - kept + first, seen, device=device)])
    place_T1 = torch.arange(seen - q_BTHK.shape[1], seen, device=device)[:, None]
    seen_TS = (place_S <= place_T1) & ((place_S > place_T1 - window) | (place_S < first_tokens))
    q_BTGrK = (wide(q_BTHK) * q_BTHK.shape[-1] ** -0.5).unflatten(2, (k_BSGK.shape[2], -1))
    score_BGrTS = torch.einsum("btgrk,bsgk->bgrts", q_BTGrK, wide(k_BSGK)).masked_fill(~seen_TS, -torch.inf)
    o_BTGrV = torch.einsum("bgrts,bsgv->btgrv", score_BGrTS.softmax(-1), wide(v_BSGV))
    return o_BTGrV.flatten(2, 3).to(v_BSGV.dtype)


def mean_look_back(q_BTHK: Tensor, k_BTGK: Tensor, positions_BT: Tensor, *, window: int | None = None,
                   chunk: int = 256) -> Tensor:
    """Mean distance from queries to the keys they read, per head, weighted by softmax attention.

    The first token of each document is left out as a key, and the rest is normalised without it.

    Args:
        q_BTHK: queries, normalised and rotated.
        k_BTGK: keys.
        positions_BT: positions of the tokens in their documents.
        window: keys that a token sees; None: all.
        chunk: queries whose scores are in memory at once.

    Returns:
        Distances [H] in tokens, in fp32 at least.

    Example:
        >>> q, k = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)
        >>> mean_look_back(q, k, torch.arange(4)[None]).tolist()  # (0 + 1/2 + 1) / 3 over tokens 1, 2, 3
        [0.5]
    """
    T, H = q_BTHK.shape[1:3]
    place_T = torch.arange(T, device=q_BTHK.device)
    start_BT = place_T - positions_BT
    k_BTHK = wide(k_BTGK).repeat_interleave(H // k_BTGK.shape[2], 2)
    total_H, count = torch.zeros(H, dtype=k_BTHK.dtype, device=q_BTHK.device), 0
    for begin in range(0, T, chunk):
        rows = slice(begin, min(begin + chunk, T))
        distance_TS = place_T[rows, None] - place_T
        seen_BTS = (distance_TS >= 0) & (place_T > start_BT[:, rows, None])
        if window is not None:
            seen_BTS = seen_BTS & (distance_TS < window)
        counts_BT = seen_BTS.any(-1)  # the first token of a document sees nothing but itself
        score_BHTS = torch.einsum("bthk,bshk->bhts", wide(q_BTHK[:, rows]), k_BTHK) * q_BTHK.shape[-1] ** -0.5
        score_BHTS = score_BHTS.masked_fill(~seen_BTS[:, None], -torch.inf)
        p_BHTS = torch.where(counts_BT[:, None, :, None], score_BHTS, 0.0).softmax(-1)
        mean_BHT = (p_BHTS * distance_TS).sum(-1)
        total_H += torch.where(counts_BT[:, None], mean_BHT, 0.0).sum((0, 2))
        count += int(counts_BT.sum())
    return total_H / max(count, 1)
