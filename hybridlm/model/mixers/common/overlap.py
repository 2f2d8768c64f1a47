"""Scores of blocks from a softmax over overlapping windows of keys.

A window of `length` tokens starts every `stride` tokens. A block of C tokens is overlapped by those that share a token
with it: windows r j - (l - 1) .. r j + r - 1 of its document, r = C / stride, l = length / stride.

B rows, Q queries, U lists, E windows per row, P blocks per row, O windows that overlap a block, X blocks that have
one of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hybridlm.model.mixers.common.entries import EntryWindows

Reduce = Literal["sum", "max"]


def overlap_counts(block: int, length: int, stride: int) -> tuple[int, list[int]]:
    """The windows that overlap a block: how many begin before it does, and the multiplicity of each.

    The multiplicity counts pairs of a stride of the block and a stride of the window that are the same tokens
    (Yuan et al. 2025, NSA, equation 9; its index is taken to align windows by overlap).

    >>> overlap_counts(64, 32, 16)
    (1, [1, 2, 2, 2, 1])
    """
    strides, parts = block // stride, length // stride
    counts = [sum(1 for m in range(strides) if 0 <= m - o < parts) for o in range(-(parts - 1), strides)]
    return parts - 1, counts


def reduce_to_blocks(weight_BQUE: Tensor, windows: EntryWindows, blocks: EntryWindows, rows: slice,
                     reduce: Reduce) -> Tensor:
    """Sum or maximum of the weights of the visible windows that overlap each block, [B, Q, U, P].

    Args:
        weight_BQUE: weights, at least zero, of all windows; zero where a query does not see one.
        windows: the windows.
        blocks: the blocks.
        rows: the queries.
        reduce: `sum` counts a window as often as strides of it lie in the block, `max` takes the largest.
    """
    before, counts = overlap_counts(blocks.length, windows.length, windows.stride)
    per_block = blocks.length // windows.stride
    batch, queries, lists = weight_BQUE.shape[:3]
    total_BQUP = weight_BQUE.new_zeros(batch, lists, queries, blocks.number).transpose(1, 2)  # as top-k reads them
    for offset, count in zip(range(-before, per_block), counts, strict=True):
        places, found_BQUX = _windows_of_blocks(weight_BQUE, windows, blocks, per_block, offset)
        part_BQUX = total_BQUP[..., places]
        if reduce == "max":
            part_BQUX.copy_(torch.maximum(part_BQUX, found_BQUX))
        else:
            part_BQUX.add_(found_BQUX, alpha=count)
    return total_BQUP


def _windows_of_blocks(weight_BQUE: Tensor, windows: EntryWindows, blocks: EntryWindows, per_block: int,
                       offset: int) -> tuple[slice, Tensor]:
    """The weight of one window of each block that has it: the blocks, and the weights. The first of a block is 0."""
    if windows.one_document:  # blocks stand at equal distances
        first = max(0, -(offset // per_block))  # of earlier blocks the window lies in front of the document
        found_BQUX = weight_BQUE[..., first * per_block + offset :: per_block][..., : blocks.number - first]
        return slice(first, first + found_BQUX.shape[-1]), found_BQUX
    within_BP = blocks.place_BE // blocks.length * per_block + offset
    entry_BP = (windows.first_BS.gather(1, blocks.start_BE) + within_BP).clamp(0, windows.number - 1)
    # Windows of a later document would stand behind the last one of this document; no query of this one sees them.
    found_BQUP = weight_BQUE.gather(3, entry_BP[:, None, None].expand(*weight_BQUE.shape[:3], -1))
    return slice(0, blocks.number), found_BQUP.masked_fill((within_BP < 0)[:, None, None], 0.0)


def window_softmax(score_BQGRE: Tensor, windows: EntryWindows, rows: slice) -> Tensor:
    """Softmax over the windows that each query sees, zeros where it sees none: [B, Q, G, R, E]."""
    hidden = ~windows.visible(rows)[:, :, None, None]
    none = hidden.all(-1, keepdim=True)
    score = score_BQGRE.masked_fill(hidden, -torch.inf).masked_fill(none, 0.0)  # no NaN of a softmax over nothing
    return torch.softmax(score, -1).masked_fill(none | hidden, 0.0)
