"""Forgetting attention with all scores in memory: the definition that every other backend is compared with.

B rows, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.attention.reference import visible
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide


def forgetting_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, g_BSH: Tensor, scale: float,
                         window: int | None, cu_seqlens: CuSeqlens | None) -> Tensor:
    """o_t = sum_s p_ts v_s, p_t = softmax over visible s of (scale q_t . k_s + g_{s+1} + ... + g_t).

    Lin et al. 2025 (Forgetting Transformer), eq. 4 and 7.
    """
    batch, queries, heads, _ = q_BTHK.shape
    keys, groups = k_BSGK.shape[1:3]
    q_BHTK = wide(q_BTHK).transpose(1, 2)
    k_BHSK = wide(k_BSGK).transpose(1, 2).repeat_interleave(heads // groups, 1)
    v_BHSV = wide(v_BSGV).transpose(1, 2).repeat_interleave(heads // groups, 1)
    later_SS = torch.ones(keys, keys, dtype=torch.bool, device=g_BSH.device).triu(1)  # [s, i]: i > s
    g_BH1S = wide(g_BSH).transpose(1, 2)[:, :, None]
    forgotten_BHTS = torch.where(later_SS, g_BH1S, 0.0).cumsum(-1).mT[:, :, keys - queries :]
    mask_BTS = visible(queries, keys, window, q_BTHK.device).expand(batch, queries, keys)
    if cu_seqlens is not None:
        document_BT = cu_seqlens.document_ids().view(batch, queries)
        mask_BTS = mask_BTS & (document_BT[:, :, None] == document_BT[:, None, :])
    score_BHTS = q_BHTK @ k_BHSK.mT * scale + forgotten_BHTS
    p_BHTS = torch.softmax(score_BHTS.masked_fill(~mask_BTS[:, None], -torch.inf), -1)
    return (p_BHTS @ v_BHSV).transpose(1, 2).to(v_BSGV.dtype)
