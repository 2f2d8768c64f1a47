"""Softmax attention and the sum of its exponentials, with all scores in memory.

B rows, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.attention.reference import visible
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide


def attention_total(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, window: int | None,
                    cu_seqlens: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """n_t = sum_s e^{score_ts - m_t} with m_t the largest score, and o_t = sum_s e^{score_ts - m_t} v_s / n_t."""
    batch, queries, heads, _ = q_BTHK.shape
    keys, groups = k_BSGK.shape[1:3]
    q_BHTK = wide(q_BTHK).transpose(1, 2)
    k_BHSK, v_BHSV = (wide(x).transpose(1, 2).repeat_interleave(heads // groups, 1) for x in (k_BSGK, v_BSGV))
    mask_BTS = visible(queries, keys, window, q_BTHK.device).expand(batch, queries, keys)
    if cu_seqlens is not None:
        document_BT = cu_seqlens.document_ids().view(batch, queries)
        mask_BTS = mask_BTS & (document_BT[:, :, None] == document_BT[:, None, :])
    score_BHTS = (q_BHTK @ k_BHSK.mT * scale).masked_fill(~mask_BTS[:, None], -torch.inf)
    weight_BHTS = (score_BHTS - score_BHTS.amax(-1, keepdim=True)).exp()
    total_BHT = weight_BHTS.sum(-1)
    o_BHTV = weight_BHTS @ v_BHSV / total_BHT[..., None]
    return o_BHTV.transpose(1, 2).to(v_BSGV.dtype), total_BHT.transpose(1, 2)
