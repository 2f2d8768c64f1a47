"""Softmax attention to a window and to the first tokens of each document.

Heads of trained transformers put much of their attention on the first token, for want of anything to read; a window
without it changes them more than the lost context does (Xiao et al. 2023, StreamingLLM).

B rows, T tokens, S keys, F first tokens, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.mixers.common.dense_attention import heads_of_all_tokens
from hybridlm.model.mixers.common.masks import attend_seen
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import selected_attention
from hybridlm_kernels.packing import CuSeqlens
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
        return _attend_rows(q_BTHK, k_BSGK, v_BSGV, seq.positions_BT, seq.cu_seqlens, window, first_tokens)
    q, k, v = heads_of_all_tokens(shard, [q_BTHK], [k_BSGK, v_BSGV])
    if shard.borders is None:
        positions_BT = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
    else:
        positions_BT = shard.borders.positions().view(q.shape[:2])
    return shard.by_tokens(_attend_rows(q, k, v, positions_BT, shard.borders, window, first_tokens))


def _attend_rows(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, positions_BT: Tensor, borders: CuSeqlens | None,
                 window: int, first_tokens: int) -> Tensor:
    """Attention of complete rows: the first tokens that the window does not hold are listed for each query."""
    place_F = torch.arange(first_tokens, device=q_BTHK.device)
    start_BT1 = (torch.arange(q_BTHK.shape[1], device=q_BTHK.device) - positions_BT)[..., None]
    listed_BTF = torch.where(place_F <= positions_BT[..., None] - window, start_BT1 + place_F, -1)
    return selected_attention(q_BTHK, k_BTGK, v_BTGV, listed_BTF[:, :, None], window=window, cu_seqlens=borders)[0]


def _attend_kept(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int, first_tokens: int, seen: int) -> Tensor:
    """Attention to the keys that a decode state keeps: first tokens, then the newest ones."""
    device, kept = q_BTHK.device, k_BSGK.shape[1]
    first = min(first_tokens, kept)
    place_S = torch.cat([torch.arange(first, device=device), torch.arange(seen - kept + first, seen, device=device)])
    place_T1 = torch.arange(seen - q_BTHK.shape[1], seen, device=device)[:, None]
    seen_TS = (place_S <= place_T1) & ((place_S > place_T1 - window) | (place_S < first_tokens))
    return attend_seen(q_BTHK, k_BSGK, v_BSGV, seen_TS, None)


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
