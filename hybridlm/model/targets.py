"""Targets: the tokens that each position predicts, and the known tokens that multi-token prediction gets as input.

B rows, T tokens per row. A document is a row, or what `cu_seqlens` says; nothing here looks past its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens

IGNORE = -100


def shift_within_documents(values_BT: Tensor, steps: int, cu_seqlens: CuSeqlens | None = None) -> tuple[Tensor, Tensor]:
    """Read each position's value from `steps` positions later, within its document.

    Args:
        values_BT: any values [B, T].
        steps: distance in tokens.
        cu_seqlens: borders of the documents; None: each row is one.

    Returns:
        The values [B, T], and whether the later position is in the same document, bool [B, T]. Where it is not, the
        value is that of the document's last position.
    """
    batch, length = values_BT.shape
    device = values_BT.device
    index_N = torch.arange(batch * length, device=device)
    if cu_seqlens is None:
        last_N = (index_N // length + 1) * length - 1
    else:
        last_N = (cu_seqlens.ends()[cu_seqlens.document_ids()] - 1).to(device)
    inside_N = index_N + steps <= last_N
    shifted_N = values_BT.reshape(-1)[torch.minimum(index_N + steps, last_N)]
    return shifted_N.view(batch, length), inside_N.view(batch, length)


def build_targets(labels_BT: Tensor, depth: int = 0,
                  cu_seqlens: CuSeqlens | Tensor | list[int] | None = None) -> Tensor:
    """Make targets from labels aligned with the inputs (the transformers convention).

    targets[b, t, d] is labels[b, t + 1 + d], or -100 where that position lies in another document.

    Args:
        labels_BT: int64 [B, T], -100 where a token does not count.
        depth: depth of multi-token prediction.
        cu_seqlens: borders of the documents over the flattened rows; None: each row is one.

    Returns:
        int64 [B, T, 1 + depth].

    Raises:
        ValueError: borders that do not fit the labels.
    """
    cu = None if cu_seqlens is None else CuSeqlens.of(cu_seqlens, labels_BT.device)
    if cu is not None:
        cu.check(*labels_BT.shape)
    targets = []
    for d in range(1 + depth):
        shifted_BT, inside_BT = shift_within_documents(labels_BT, 1 + d, cu)
        targets.append(shifted_BT.masked_fill(~inside_BT, IGNORE))
    return torch.stack(targets, dim=-1)


def tokens_ahead(input_ids_BT: Tensor, targets_BTd: Tensor, steps: int,
                 cu_seqlens: CuSeqlens | None = None) -> Tensor:
    """Find the token `steps` positions later, the input of the MTP module of that depth.

    A document that is longer than the window continues in the targets: beyond the end of the window the token is read
    from them. Where they do not have it either, it is the document's last token, and no target of that position counts.

    Args:
        input_ids_BT: int64 [B, T].
        targets_BTd: int64 [B, T, 1 + depth], from `build_targets` or the loader.
        steps: distance in tokens, at least 1.
        cu_seqlens: borders of the documents; None: each row is one.

    Returns:
        int64 [B, T].
    """
    shifted_BT, inside_BT = shift_within_documents(input_ids_BT, steps, cu_seqlens)
    known_BT = targets_BTd[..., steps - 1]
    return torch.where(inside_BT | (known_BT < 0), shifted_BT, known_BT)


def tokens_of_modules(input_ids_BT: Tensor | None, targets_BTd: Tensor | None,
                      cu_seqlens: CuSeqlens | None = None) -> list[Tensor]:
    """Find the tokens ahead that each module of multi-token prediction gets, [B, T] per module; none without targets.

    Raises:
        ValueError: there are modules, and embeddings in place of ids.
    """
    depth = 0 if targets_BTd is None else targets_BTd.shape[-1] - 1
    if targets_BTd is None or not depth:
        return []
    if input_ids_BT is None:
        raise ValueError("multi-token prediction embeds the tokens ahead: train it with input_ids, or without "
                         "inputs_embeds")
    return [tokens_ahead(input_ids_BT, targets_BTd, steps, cu_seqlens) for steps in range(1, depth + 1)]


def check_targets(batch_and_length: torch.Size, labels: Tensor | None, targets: Tensor | None,
                  cu_seqlens: CuSeqlens | None, depth: int) -> Tensor | None:
    """Make targets of labels, or check those that were given.

    Args:
        batch_and_length: B and T of the tokens.
        labels: int64 [B, T], not shifted, or None.
        targets: int64 [B, T, 1 + depth], or None.
        cu_seqlens: borders of the documents; None: each row is one.
        depth: of multi-token prediction.

    Returns:
        Targets [B, T, 1 + depth], or None where neither was given.

    Raises:
        ValueError: both were given, or one of another shape.
    """
    if labels is not None:
        if targets is not None:
            raise ValueError("labels and targets say the same thing: pass one of them")
        if labels.shape != batch_and_length:
            raise ValueError(f"labels must be {list(batch_and_length)}; got {list(labels.shape)}")
        return build_targets(labels, depth, cu_seqlens)
    if targets is not None and targets.shape != (*batch_and_length, 1 + depth):
        raise ValueError(f"targets must be [batch, time, 1 + mtp.depth] = {[*batch_and_length, 1 + depth]}; "
                         f"got {list(targets.shape)}")
    return targets
