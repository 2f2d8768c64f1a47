"""Logits and cross entropy by the output matrix, whether its weight can be read or its module must be called.

B rows, T tokens, N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridlm.model.readable_weights import readable_weight
from hybridlm_kernels import linear_cross_entropy

CHUNK_LOGITS = 2**24  # logits that are in memory at once where the head is called


def project_to_vocabulary(x: Tensor, lm_head: nn.Module | None, embed: nn.Module) -> Tensor:
    """Compute logits [..., V] before any soft cap.

    Args:
        x: hidden states [..., D] after the final norm.
        lm_head: the output head; None: it is tied to the embedding.
        embed: the embedding.
    """
    if lm_head is not None:
        return lm_head(x)
    return F.linear(x, _tied_weight(embed, x.device))


def head_cross_entropy(x_ND: Tensor, labels_N: Tensor, lm_head: nn.Module | None, embed: nn.Module, *,
                       z_loss: float = 0.0, soft_cap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of the next tokens, without ever holding all logits.

    Args:
        x_ND: hidden states after the final norm.
        labels_N: int64, -100 where a token does not count.
        lm_head: the output head; None: it is tied to the embedding.
        embed: the embedding.
        z_loss: not zero makes the second result differentiable.
        soft_cap: bound of the logits; None: none.

    Returns:
        Sums over the tokens that count of the cross entropy in nats and of logsumexp^2, and the number of these tokens.
    """
    weight_VD = (_tied_weight(embed, x_ND.device) if lm_head is None else readable_weight(lm_head, x_ND.device))
    if weight_VD is None:
        assert lm_head is not None
        return _called_cross_entropy(x_ND, labels_N, lm_head, z_loss, soft_cap)
    if torch.is_autocast_enabled(x_ND.device.type):  # a fused operation does not take part in autocast
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
    return linear_cross_entropy(x_ND, weight_VD, labels_N, z_loss=z_loss, soft_cap=soft_cap)


def _tied_weight(embed: nn.Module, device: torch.device) -> Tensor:
    """The matrix [V, D] of an embedding: its weight, or the vectors of all tokens where it has to be called.

    Hooks on an embedding change the vectors of the tokens that it looks up (noise in fine-tuning), not the head.
    """
    weight_VD = readable_weight(embed, device, ignore_hooks=True)
    if weight_VD is not None:
        return weight_VD
    return embed(torch.arange(len(cast(Tensor, embed.weight)), device=device))


def _called_cross_entropy(x_ND: Tensor, labels_N: Tensor, lm_head: nn.Module, z_loss: float,
                          soft_cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `linear_cross_entropy` by calls of the head; the backward makes the logits of each chunk again."""

    def sums(x_CD: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = lm_head(x_CD)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        if soft_cap is not None:
            logits_CV = soft_cap * torch.tanh(logits_CV / soft_cap)
        loss = F.cross_entropy(logits_CV, labels_C, ignore_index=-100, reduction="sum")
        z_C = torch.logsumexp(logits_CV if z_loss else logits_CV.detach(), -1).square()
        return loss, (z_C * (labels_C != -100)).sum()

    run: Callable[..., tuple[Tensor, Tensor]] = sums
    if torch.is_grad_enabled():
        def run(x_CD: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
            return checkpoint(sums, x_CD, labels_C, use_reentrant=False)  # keeps the random state, for dropout
    rows = max(1, CHUNK_LOGITS // len(cast(Tensor, lm_head.weight)))
    parts = [run(x_CD, labels_C) for x_CD, labels_C in zip(x_ND.split(rows), labels_N.split(rows), strict=True)]
    losses, zs = zip(*parts, strict=True)
    return torch.stack(losses).sum(), torch.stack(zs).sum(), (labels_N != -100).sum()
