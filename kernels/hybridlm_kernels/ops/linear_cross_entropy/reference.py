"""Linear layer and cross entropy with all logits in memory. N tokens, D features, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore_index: int = -100,
                         z_loss: float = 0.0, soft_cap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """sum of (logsumexp_v l_v - l_label), sum of logsumexp^2, and the number of tokens that count."""
    logits_NV = x_ND @ weight_VD.T
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if soft_cap is not None:
        logits_NV = soft_cap * torch.tanh(logits_NV / soft_cap)
    counted_N = labels_N != ignore_index
    lse_N = torch.logsumexp(logits_NV, -1)
    picked_N = logits_NV.gather(1, labels_N.where(counted_N, 0)[:, None])[:, 0]
    loss_sum = ((lse_N - picked_N) * counted_N).sum()
    z_sum = (lse_N.square() * counted_N).sum()
    return loss_sum, z_sum if z_loss else z_sum.detach(), counted_N.sum()
