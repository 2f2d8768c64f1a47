"""Token-level sparse attention (DeepSeek-V3.2) with all scores in memory.

B rows, T queries (the last T positions), S keys, J index heads, I index dim, H query heads,
G key/value heads, K key dim, V value dim, N selected keys per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.attention.reference import visible
from hybridlm_kernels.packing import CuSeqlens


def indexer_scores(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor) -> Tensor:
    """Scores of the indexer [B, T, S]: score_ts = sum_j w_tj relu(q_tj . k_s)."""
    wide = torch.promote_types(q_BTJI.dtype, torch.float32)
    dots_BTJS = torch.einsum("btji,bsi->btjs", q_BTJI.to(wide), k_BSI.to(wide))
    return torch.einsum("btj,btjs->bts", w_BTJ.to(wide), dots_BTJS.relu())


def indexer_topk(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, topk: int, cu_seqlens: CuSeqlens | None = None,
                 num_first: int = 0, num_local: int = 0) -> Tensor:
    """The `topk` visible keys of highest score, ties to the lowest position; ascending, padded with -1."""
    batch, queries = q_BTJI.shape[:2]
    keys = k_BSI.shape[1]
    mask_BTS = visible(queries, keys, None, q_BTJI.device).expand(batch, queries, keys)
    if cu_seqlens is not None:
        document_BS = cu_seqlens.document_ids().view(batch, keys)
        mask_BTS = mask_BTS & (document_BS[:, -queries:, None] == document_BS[:, None, :])
    rank_BTS = mask_BTS.cumsum(-1)  # 1 at the first visible key
    always_BTS = (rank_BTS <= num_first) | (rank_BTS > rank_BTS[..., -1:] - num_local)
    score_BTS = indexer_scores(q_BTJI, k_BSI, w_BTJ).masked_fill(always_BTS, torch.inf)
    score_BTS = score_BTS.masked_fill(~mask_BTS, -torch.inf)
    order_BTS = torch.sort(score_BTS, dim=-1, descending=True, stable=True).indices[..., :topk]
    order_BTS = order_BTS.masked_fill(~mask_BTS.gather(-1, order_BTS), keys).sort(-1).values
    out_BTN = torch.full((batch, queries, topk), -1, dtype=torch.int32, device=q_BTJI.device)
    out_BTN[..., : order_BTS.shape[-1]] = order_BTS.masked_fill(order_BTS == keys, -1)
    return out_BTN


def sparse_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor,
                     scale: float | None = None) -> Tensor:
    """Softmax attention over the listed keys only; a query with an empty list gets zeros."""
    batch, queries, heads, dim = q_BTHK.shape
    keys, groups = k_BSGK.shape[1:3]
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    chosen_BTS = torch.zeros(batch, queries, keys + 1, dtype=torch.bool, device=q_BTHK.device)
    chosen_BTS.scatter_(-1, indices_BTN.long().masked_fill(indices_BTN < 0, keys), True)
    chosen_BTS = chosen_BTS[..., :keys]
    k_BSHK = k_BSGK.to(wide).repeat_interleave(heads // groups, 2)
    v_BSHV = v_BSGV.to(wide).repeat_interleave(heads // groups, 2)
    scale = dim**-0.5 if scale is None else scale
    score_BHTS = scale * torch.einsum("bthk,bshk->bhts", q_BTHK.to(wide), k_BSHK)
    score_BHTS = score_BHTS.masked_fill(~chosen_BTS[:, None], -torch.inf)
    empty_BT = ~chosen_BTS.any(-1)
    p_BHTS = torch.softmax(score_BHTS.masked_fill(empty_BT[:, None, :, None], 0.0), -1)
    p_BHTS = p_BHTS * ~empty_BT[:, None, :, None]
    return torch.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV).to(v_BSGV.dtype)
