"""Borders of documents from what transformers' callers pass: masks, positions, and the tables of packed collators.

transformers has several ways to say that a row holds several documents, or padding. All of them are read here into the
one form that every layer of ours knows: borders over the flattened tokens. What cannot be honoured is refused by name.

Letters: B rows, T tokens per row, N documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm_kernels import CuSeqlens

BORDER_TABLES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(frozen=True)
class RowLayout:
    """Documents and padding of a batch.

    Attributes:
        borders: borders of the documents over the B*T flattened tokens, row starts included; None: each row is one
            document.
        is_text_BT: False where a token is padding, bool [B, T] on the host; None: there is no padding.
    """

    borders: list[int] | None = None
    is_text_BT: Tensor | None = None


def read_layout(batch: int, length: int, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                seq_idx: Tensor | None = None, tables: Mapping[str, Tensor | None] | None = None) -> RowLayout:
    """Read documents and padding; the given tensors must agree.

    A run of padding is a document of its own, so nothing sees it, on whichever side of the text it stands.

    Args:
        batch: number of rows B.
        length: tokens per row T.
        attention_mask: [B, T]: 0 is padding; 1 is text, or a number per sample of a packed row (1, 1, 2, 2, 2, 0).
        position_ids: [B, T] or [1, T], counted from 0 in each document.
        seq_idx: [B, T], one number per document, as Mamba's kernels take it.
        tables: cumulative lengths [N + 1] by name, as flash attention takes them.

    Raises:
        ValueError: a form that cannot be honoured, or two tensors that describe different documents.

    >>> read_layout(1, 5, position_ids=torch.tensor([[0, 1, 0, 1, 2]])).borders
    [0, 2, 5]
    >>> read_layout(2, 3, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]])).borders
    [0, 1, 3, 6]
    """
    mask = None if attention_mask is None else read_mask(attention_mask, batch, length)
    text = None if mask is None or bool(mask.all()) else mask != 0
    starts_of: dict[str, Tensor] = {}
    mask_starts = _row_starts(batch, length)
    if mask is not None:
        mask_starts[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        _check_runs(mask, mask_starts)
    if position_ids is not None:
        positions = _on_host("position_ids", position_ids, batch, length)
        starts_of["position_ids"] = _restarts(positions, text, mask_starts)
    if seq_idx is not None:
        numbers = _on_host("seq_idx", seq_idx, batch, length)
        starts = _row_starts(batch, length)
        starts[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
        starts_of["seq_idx"] = starts
    for name, table in (tables or {}).items():
        if table is None:
            continue
        if text is not None:
            raise ValueError(f"{name} beside an attention_mask with padding is ambiguous: pass one of them")
        starts_of[name] = _table_starts(name, table, batch, length)
    starts = _agreed(starts_of, mask_starts)
    several = bool(starts[:, 1:].any())
    if mask is not None and text is not None and int(mask.max()) == 1 and torch.equal(starts, mask_starts):
        several = bool((text[:, 1:] > text[:, :-1]).any())  # no layer looks ahead to padding after the text
    borders = [*starts.flatten().nonzero().flatten().tolist(), batch * length] if several else None
    return RowLayout(borders, text)


def read_mask(attention_mask: Tensor, batch: int, length: int) -> Tensor:
    """The mask on the host, int64 [B, T].

    Raises:
        ValueError: a mask of another shape, or one of scores that are added.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, length):
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must be [batch, time] = {[batch, length]}, 0 for padding; got {got}. Say "
                         "with position_ids, cu_seq_lens_q or seq_idx where documents of a row start")
    mask = attention_mask.detach().cpu()
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must hold 0 for padding and 1 for text; got other floating-point values "
                         f"(from {float(mask.min())} to {float(mask.max())}): scores that are added cannot be read")
    mask = mask.long()
    if int(mask.min()) < 0:
        raise ValueError(f"attention_mask must not be negative; got {int(mask.min())}")
    return mask


def _row_starts(batch: int, length: int) -> Tensor:
    starts = torch.zeros(batch, length, dtype=torch.bool)
    starts[:, 0] = True
    return starts


def _on_host(name: str, values: Tensor, batch: int, length: int) -> Tensor:
    if values.dim() == 1:
        values = values[None]
    if values.dim() != 2 or values.shape[1] != length or values.shape[0] not in (1, batch):
        raise ValueError(f"{name} must be [batch, time] = {[batch, length]}; got {list(values.shape)}")
    return values.detach().cpu().long().expand(batch, length)


def _check_runs(mask: Tensor, starts: Tensor) -> None:
    """Refuse a mask in which the tokens of one sample stand apart: what is between them would have to be skipped."""
    for row, number_of_row in enumerate(mask):
        runs = number_of_row[starts[row]].tolist()
        numbers = [number for number in runs if number != 0]
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"attention_mask has padding inside the text of row {row}: put it before or after the "
                             "text, or give each document of a packed row a number of its own (1, 1, 2, 2)")


def _restarts(positions: Tensor, text: Tensor | None, mask_starts: Tensor) -> Tensor:
    """Mark where the positions start again from 0; every other position must follow the one before it."""
    follows = torch.zeros_like(positions, dtype=torch.bool)
    follows[:, 1:] = positions[:, 1:] == positions[:, :-1] + 1
    follows &= ~mask_starts
    wrong = ~follows & (positions != 0)
    if text is not None:
        wrong &= text  # positions of padding mean nothing
    if bool(wrong.any()):
        row, token = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"position_ids must count from 0 in each document; got {int(positions[row, token])} at row "
                         f"{row}, token {token}" + (f" after {int(positions[row, token - 1])}" if token else "")
                         + ". If there is padding, pass an attention_mask")
    starts = ~follows
    return starts if text is None else (starts & text) | mask_starts


def _table_starts(name: str, table: Tensor, batch: int, length: int) -> Tensor:
    """Starts from cumulative lengths; equal neighbours (empty documents) are passed over."""
    try:
        borders = torch.tensor(CuSeqlens.of(table, "cpu").host)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    total = batch * length
    if int(borders[-1]) > total:
        raise ValueError(f"{name} ends at {int(borders[-1])}, but the batch holds {batch} x {length} tokens")
    starts = torch.zeros(total, dtype=torch.bool)
    starts[borders[borders < total]] = True
    starts = starts.view(batch, length)
    if not bool(starts[:, 0].all()):
        raise ValueError(f"{name} lets a document cross from one row of {length} tokens into the next")
    return starts


def _agreed(starts_of: Mapping[str, Tensor], mask_starts: Tensor) -> Tensor:
    """The document starts that all sources give, and those of the mask."""
    first: str | None = None
    for name, starts in starts_of.items():
        if first is not None and not bool((starts == starts_of[first]).all()):
            raise ValueError(f"{first} and {name} describe different documents: {int(starts_of[first].sum())} and "
                             f"{int(starts.sum())} in the batch")
        first = first or name
    return mask_starts if first is None else starts_of[first] | mask_starts
