"""The indexer's loss with all scores in memory, and the recall of a selection.

B rows, T queries (the last T positions), S keys, J index heads, I index dim, H query heads, G key heads, K key dim,
N listed keys per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.attention.reference import visible
from hybridlm_kernels.ops.sparse_attention.reference import indexer_scores
from hybridlm_kernels.packing import CuSeqlens


def support(queries: int, keys: int, batch: int, indices_BTN: Tensor | None, cu_seqlens: CuSeqlens | None,
            device: torch.device) -> Tensor:
    """Mask [B, T, S] of the keys that count: the visible ones, and of these the listed ones if there is a list."""
    mask_BTS = visible(queries, keys, None, device).expand(batch, queries, keys)
    if cu_seqlens is not None:
        document_BS = cu_seqlens.document_ids().view(batch, keys)
        mask_BTS = mask_BTS & (document_BS[:, -queries:, None] == document_BS[:, None, :])
    if indices_BTN is None:
        return mask_BTS
    listed_BTS = torch.zeros(batch, queries, keys + 1, dtype=torch.bool, device=device)
    listed_BTS.scatter_(-1, indices_BTN.long().masked_fill(indices_BTN < 0, keys), True)
    return mask_BTS & listed_BTS[..., :keys]


def main_attention(q_BTHK: Tensor, k_BSGK: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """p_ts = sum_h softmax_s(scale q_th . k_sh) / H over the keys of the mask; rows without a key are zero."""
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    k_BSHK = k_BSGK.to(wide).repeat_interleave(q_BTHK.shape[2] // k_BSGK.shape[2], 2)
    score_BHTS = scale * torch.einsum("bthk,bshk->bhts", q_BTHK.to(wide), k_BSHK)
    score_BHTS = score_BHTS.masked_fill(~mask_BTS[:, None], -torch.inf)
    return torch.softmax(score_BHTS, -1).nan_to_num(0.0).mean(1)


def indexer_kl(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, main_q_BTHK: Tensor, main_k_BSGK: Tensor,
               indices_BTN: Tensor | None, recall_of_BTN: Tensor | None, scale: float,
               cu_seqlens: CuSeqlens | None) -> tuple[Tensor, ...]:
    """KL and entropy by autograd through log softmax(I)."""
    batch, queries = q_BTJI.shape[:2]
    mask_BTS = support(queries, k_BSI.shape[1], batch, indices_BTN, cu_seqlens, q_BTJI.device)
    score_BTS = indexer_scores(q_BTJI, k_BSI, w_BTJ)
    p_BTS = main_attention(main_q_BTHK, main_k_BSGK, mask_BTS, scale).to(score_BTS.dtype)
    empty_BT1 = ~mask_BTS.any(-1, keepdim=True)
    log_q_BTS = torch.log_softmax(score_BTS.masked_fill(~mask_BTS & ~empty_BT1, -torch.inf), -1)
    log_q_BTS = log_q_BTS.masked_fill(~mask_BTS, 0.0)
    count = (~empty_BT1).sum().clamp(min=1)
    loss = (torch.xlogy(p_BTS, p_BTS) - p_BTS * log_q_BTS).sum() / count
    entropy = -(log_q_BTS.exp() * log_q_BTS).sum() / count
    recall = () if recall_of_BTN is None else attention_recall(main_q_BTHK, main_k_BSGK, recall_of_BTN, scale,
                                                               cu_seqlens)
    return loss, entropy.detach(), *recall


def attention_recall(main_q_BTHK: Tensor, main_k_BSGK: Tensor, indices_BTN: Tensor, scale: float,
                     cu_seqlens: CuSeqlens | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, agreement and attainable mass of the listed keys, from all attention weights."""
    batch, queries = main_q_BTHK.shape[:2]
    keys, device = main_k_BSGK.shape[1], main_q_BTHK.device
    seen_BTS = support(queries, keys, batch, None, cu_seqlens, device)
    listed_BTS = support(queries, keys, batch, indices_BTN, cu_seqlens, device)
    p_BTS = main_attention(main_q_BTHK, main_k_BSGK, seen_BTS, scale)
    n_BT = listed_BTS.sum(-1)
    chose_BT = seen_BTS.sum(-1) > n_BT
    order_BTS = p_BTS.masked_fill(~seen_BTS, -1.0).argsort(dim=-1, descending=True, stable=True)
    rank_S = torch.arange(keys, device=device)
    best_BTS = torch.zeros_like(seen_BTS).scatter_(-1, order_BTS, rank_S < n_BT[..., None])
    mass_BT = (p_BTS * listed_BTS).sum(-1)
    agreement_BT = (best_BTS & listed_BTS).sum(-1).to(p_BTS.dtype) / n_BT.clamp(min=1)
    attainable_BT = (p_BTS * best_BTS).sum(-1)
    if not chose_BT.any():
        return p_BTS.new_ones(()), p_BTS.new_ones(()), p_BTS.new_ones(())
    return mass_BT[chose_BT].mean(), agreement_BT[chose_BT].mean(), attainable_BT[chose_BT].mean()
