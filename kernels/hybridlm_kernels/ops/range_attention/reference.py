"""Attention of each query to a range of keys as its equations read, with all scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.precision import wide


def range_attention(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, first_BT: Tensor, count_BT: Tensor,
                    scale: float) -> tuple[Tensor, Tensor]:
    """o = sum_e softmax(scale q . k_e) v_e over first <= e < first + count, and log sum_e exp(scale q . k_e)."""
    entry_E = torch.arange(k_BEGK.shape[1], device=k_BEGK.device)
    seen_BTE = (entry_E >= first_BT[..., None]) & (entry_E < (first_BT + count_BT)[..., None])
    q_BTGRK = wide(q_BTHK).unflatten(2, (k_BEGK.shape[2], -1))
    score = torch.einsum("btgrk,begk->btgre", q_BTGRK, wide(k_BEGK)) * scale
    hidden = ~seen_BTE[:, :, None, None]
    none = hidden.all(-1, keepdim=True)
    score = score.masked_fill(hidden, -torch.inf).masked_fill(none, 0.0)  # no NaN of a softmax over nothing
    p_BTGRE = score.softmax(-1).masked_fill(none, 0.0)
    o_BTHV = torch.einsum("btgre,begv->btgrv", p_BTGRE, wide(v_BEGV)).flatten(2, 3)
    return o_BTHV.to(v_BEGV.dtype), score.logsumexp(-1).masked_fill(none[..., 0], -torch.inf).flatten(2)
