"""The pooled indexer with all scores in memory.

B rows, T queries, S keys, P pools, J index heads, I index dim, H query heads, G key heads, K key dim, M selected pools.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.indexer_kl.reference import attention_recall, main_attention, support
from hybridlm_kernels.ops.pooled_indexer.pools import Pools
from hybridlm_kernels.ops.sparse_attention.reference import indexer_scores
from hybridlm_kernels.packing import CuSeqlens


def membership(pools: Pools, seen_BTP: Tensor) -> Tensor:
    """Mask [B, T, P, S]: token s is in pool p, which query t sees."""
    s_S = torch.arange(pools.keys, device=seen_BTP.device)
    inside_BPS = (s_S >= pools.start_BP[..., None]) & (s_S < pools.start_BP[..., None] + pools.size)
    return seen_BTP[..., None] & inside_BPS[:, None]


def pooled_topk(q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, pools: Pools, topk: int, num_first: int = 0,
                num_local: int = 0) -> Tensor:
    """The `topk` visible pools of highest score, ties to the earlier one; ascending, padded with -1."""
    seen_BTP = pools.visible(slice(None))
    rank_BTP = seen_BTP.cumsum(-1)  # 1 at the first visible pool
    always_BTP = (rank_BTP <= num_first) | (rank_BTP > pools.count_BT[..., None] - num_local)
    score_BTP = indexer_scores(q_BTJI, k_BPI, w_BTJ).masked_fill(always_BTP, torch.inf)
    score_BTP = score_BTP.masked_fill(~seen_BTP, -torch.inf)
    order = torch.sort(score_BTP, dim=-1, descending=True, stable=True).indices[..., :topk]
    order = order.masked_fill(~seen_BTP.gather(-1, order), pools.number).sort(-1).values
    out_BTM = order.new_full((*order.shape[:2], topk), -1)
    out_BTM[..., : order.shape[-1]] = order.masked_fill(order == pools.number, -1)
    return pools.tokens(out_BTM)


def pooled_indexer_kl(q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, main_q_BTHK: Tensor, main_k_BSGK: Tensor,
                      pools: Pools, indices_BTN: Tensor | None, recall_of_BTN: Tensor | None, scale: float,
                      cu_seqlens: CuSeqlens | None) -> tuple[Tensor, ...]:
    """KL and entropy by autograd through log softmax(I)."""
    batch, queries = q_BTJI.shape[:2]
    seen_BTP = pools.visible(slice(None)).expand(batch, queries, -1)
    if indices_BTN is not None:
        chosen_BTM = pools.selected(indices_BTN)
        listed_BTP = torch.zeros(batch, queries, pools.number + 1, dtype=torch.bool, device=q_BTJI.device)
        seen_BTP = seen_BTP & listed_BTP.scatter_(-1, chosen_BTM % (pools.number + 1), True)[..., :-1]
    mask_BTS = support(queries, pools.keys, batch, indices_BTN, cu_seqlens, q_BTJI.device)
    p_BTS = main_attention(main_q_BTHK, main_k_BSGK, mask_BTS, scale)
    p_BTP = torch.einsum("bts,btps->btp", p_BTS, membership(pools, seen_BTP).to(p_BTS.dtype))
    mass_BT1 = p_BTP.sum(-1, keepdim=True)
    seen_BTP = seen_BTP & (mass_BT1 > 0)
    score_BTP = indexer_scores(q_BTJI, k_BPI, w_BTJ)
    p_BTP = (p_BTP / mass_BT1.clamp(min=torch.finfo(p_BTS.dtype).tiny)).to(score_BTP.dtype)
    has_BT1 = seen_BTP.any(-1, keepdim=True)
    log_q_BTP = torch.log_softmax(score_BTP.masked_fill(~seen_BTP & has_BT1, -torch.inf), -1)
    log_q_BTP = log_q_BTP.masked_fill(~seen_BTP, 0.0)
    count = has_BT1.sum().clamp(min=1)
    loss = (torch.xlogy(p_BTP, p_BTP) - p_BTP * log_q_BTP).sum() / count
    entropy = -(log_q_BTP.exp() * seen_BTP * log_q_BTP).sum() / count
    recall = () if recall_of_BTN is None else attention_recall(main_q_BTHK, main_k_BSGK, recall_of_BTN, scale,
                                                               cu_seqlens)
    return loss, entropy.detach(), *recall
