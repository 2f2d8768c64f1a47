"""2-simplicial attention with the whole cube of scores in memory.

B rows, T queries, S first keys, R second keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.attention.reference import visible
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide


def simplicial_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, k2_BRGK: Tensor, v2_BRGV: Tensor, scale: float,
                         window: int, second_window: int, cu_seqlens: CuSeqlens | None) -> Tensor:
    """o_t = sum_{s,r} p_tsr v_s * v'_r, p_t = softmax over both of scale sum_c q_tc k_sc k'_rc (Roy et al. 2025)."""
    batch, queries, heads, _ = q_BTHK.shape
    copies = heads // k_BSGK.shape[2]
    k, v, k2, v2 = (wide(x).repeat_interleave(copies, 2) for x in (k_BSGK, v_BSGV, k2_BRGK, v2_BRGV))
    near_TS = visible(queries, k.shape[1], window, q_BTHK.device)
    near_TR = visible(queries, k2.shape[1], second_window, q_BTHK.device)
    seen_BTSR = (near_TS[:, :, None] & near_TR[:, None]).expand(batch, -1, -1, -1)
    if cu_seqlens is not None:
        document_BT = cu_seqlens.document_ids().view(batch, queries)
        same_BTT = document_BT[:, :, None] == document_BT[:, None]
        seen_BTSR = seen_BTSR & same_BTT[:, :, :, None] & same_BTT[:, :, None]
    score_BHTSR = torch.einsum("bthk,bshk,brhk->bhtsr", wide(q_BTHK), k, k2) * scale
    score_BHTSR = score_BHTSR.masked_fill(~seen_BTSR[:, None], -torch.inf)
    p_BHTSR = score_BHTSR.flatten(3).softmax(-1).view(score_BHTSR.shape)
    return torch.einsum("bhtsr,bshv,brhv->bthv", p_BHTSR, v, v2).to(v_BSGV.dtype)
