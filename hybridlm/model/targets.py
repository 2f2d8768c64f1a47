"""Targets: the tokens that each position predicts, and those it is told when it predicts further ahead.

B rows, T tokens per row. A document is a row, or what `cu_seqlens` says; nothing here looks past its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens

IGNORE = -100


def ahead(values_BT: Tensor, steps: int, cu_seqlens: CuSeqlens | None = None) -> tuple[Tensor, Tensor]:
    """The value `steps` positions later, and whether that position is still in the same document.

    Where it is not, the value is that of the document's last position.
    """
    batch, length = values_BT.shape
    device = values_BT.device
    index_N = torch.arange(batch * length, device=device)
    if cu_seqlens is None:
        last_N = (index_N // length + 1) * length - 1
    else:
        ends = torch.tensor(cu_seqlens.host[1:], device=device)
        last_N = ends[cu_seqlens.document_ids().to(device)] - 1
    inside_N = index_N + steps <= last_N
    shifted_N = values_BT.reshape(-1)[torch.minimum(index_N + steps, last_N)]
    return shifted_N.view(batch, length), inside_N.view(batch, length)


def build_targets(labels_BT: Tensor, depth: int = 0,
                  cu_seqlens: CuSeqlens | Tensor | list[int] | None = None) -> Tensor:
    """Targets [B, T, 1 + depth] from labels aligned with the inputs (the transformers convention).

    targets[b, t, d] is labels[b, t + 1 + d], or -100 where that position lies in another document.

    Raises:
        ValueError: borders that do not fit the labels.
    """
    cu = None if cu_seqlens is None else CuSeqlens.of(cu_seqlens, labels_BT.device)
    if cu is not None:
        cu.check(*labels_BT.shape)
    targets = []
    for d in range(1 + depth):
        shifted_BT, inside_BT = ahead(labels_BT, 1 + d, cu)
        targets.append(shifted_BT.masked_fill(~inside_BT, IGNORE))
    return torch.stack(targets, dim=-1)


def tokens_ahead(input_ids_BT: Tensor, targets_BTd: Tensor, steps: int,
                 cu_seqlens: CuSeqlens | None = None) -> Tensor:
    """The token `steps` positions later, as far as this batch knows it: what an MTP module is told.

    Past the end of a document's part in this batch it comes from the targets (a document longer than the window
    goes on there); where they do not know it either, the document's last token stands in, and no target of that
    position counts.
    """
    shifted_BT, inside_BT = ahead(input_ids_BT, steps, cu_seqlens)
    known_BT = targets_BTd[..., steps - 1]
    return torch.where(inside_BT | (known_BT < 0), shifted_BT, known_BT)
