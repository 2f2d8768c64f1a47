"""Tables of the Triton kernels: which queries read each block, sorted by block and cut into tiles.

A pair is an entry of a list: a query, a list, a place in it. Pairs of one block and key head lie behind one another, in
the order of the queries, and are cut into tiles of at most so many pairs. Sizes follow from shapes alone, so that no
launch waits for the device: tables are as long as they can get, and tiles at their end are empty.

B rows, T queries and S keys per row (the queries are the last T), M queries of all rows, U lists per query, N entries
per list, P blocks of all documents, X blocks by key head (P times the key heads that lists tell apart).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.triton_support import copy_table, keep_for_graphs

LEAST_WINDOW_BLOCK = 64  # keys of a block of the window: a tile of keys
SEGMENT_ROWS = 1024  # rows of queries whose sums for one block's gradients a program adds up, at least


class Documents(NamedTuple):
    """The blocks of the documents, and where those of each query's document begin.

    `blocks_P2`: first key and end of every block, over the keys of all rows. `base_M`: number of the first block of a
    query's document. `first_M`: its first key, in its row.
    """

    blocks_P2: Tensor
    base_M: Tensor
    first_M: Tensor

    @classmethod
    def of(cls, batch: int, queries: int, keys: int, block: int, borders: CuSeqlens | None,
           device: torch.device) -> Documents:
        """Cut documents into blocks; the tables of packed ones are made once, on the host."""
        if borders is not None:
            first_M = borders.first_keys(batch, queries).reshape(-1)
            blocks_P2, base_D = _packed_blocks(borders, block, device)
            base_M = base_D[borders.document_ids().view(batch, keys)[:, keys - queries :]].reshape(-1)
            return cls(blocks_P2, base_M, first_M)
        per_row = triton.cdiv(keys, block)
        place_P = torch.arange(per_row, device=device) * block
        row_B1 = torch.arange(batch, device=device)[:, None]
        begin, end = place_P + row_B1 * keys, (place_P + block).clamp(max=keys) + row_B1 * keys
        base_M = (row_B1 * per_row).expand(batch, queries).reshape(-1)
        return cls(torch.stack([begin.flatten(), end.flatten()], 1), base_M, torch.zeros_like(base_M))


def _packed_blocks(borders: CuSeqlens, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First key and end of every block [P, 2], and the number of each document's first block."""
    key = ("attention_blocks", device, block)
    if key not in borders.cache:
        start = np.asarray(borders.host[:-1], dtype=np.int64)
        lengths = np.asarray(borders.lengths, dtype=np.int64)
        counts = -(-lengths // block)
        base = np.cumsum(counts) - counts
        document = np.repeat(np.arange(len(counts)), counts)
        begin = start[document] + (np.arange(len(document)) - base[document]) * block
        end = np.minimum(begin + block, (start + lengths)[document])
        borders.cache[key] = (copy_table(np.stack([begin, end], axis=1), device), copy_table(base, device))
    return keep_for_graphs(borders.cache[key])


class Tiles(NamedTuple):
    """Tiles of pairs: block, first pair and end of each, int32 [tiles, 3]; and each block's first tile [X + 1]."""

    table: Tensor
    first_X1: Tensor

    @classmethod
    def cut(cls, first_pair_X1: Tensor, size: int, pairs: int, blocks: int) -> Tiles:
        """Cut the pairs of every block into tiles of `size`; `pairs` is the most there can be."""
        counts_X = first_pair_X1.diff()
        number_X = (counts_X + (size - 1)) // size
        stop_X = number_X.cumsum(0)
        tile = torch.arange(min(pairs, pairs // size + len(counts_X)), device=counts_X.device)
        block = torch.searchsorted(stop_X, tile, right=True)
        exists = block < len(counts_X)
        block = block.clamp(max=len(counts_X) - 1)
        begin = first_pair_X1[block] + (tile - (stop_X - number_X)[block]) * size
        end = torch.minimum(begin + size, first_pair_X1[block + 1])
        table = torch.stack([block % blocks, begin.where(exists, 0), end.where(exists, 0)], 1)
        return cls(table.int().contiguous(), torch.cat([stop_X.new_zeros(1), stop_X]).int())


class Pairs(NamedTuple):
    """The pairs of a piece of queries.

    `order`: numbers of pairs (query, list, place, in this order) sorted by block. `first_pair_X1`: where those of each
    block begin. `there_MUN`: which entries name a block that the query reads.
    """

    order: Tensor
    first_pair_X1: Tensor
    there_MUN: Tensor

    def tiles(self, size: int, blocks: int) -> Tiles:
        """The tiles of at most `size` pairs."""
        return Tiles.cut(self.first_pair_X1, size, len(self.order), blocks)


@dataclass(eq=False)
class KeySet:
    """Keys that queries read by lists of blocks, those of a window included.

    Args:
        k_BSGK: keys.
        v_BSGV: values.
        units_MUN: numbers of blocks in the query's document, -1 for none.
        documents: their blocks.
        position_M: places of the queries in their rows.
        block: tokens per block.
        hidden: of the tokens up to the query, the last so many are not read.
        window: only the last so many tokens are read; None: all.
        bias_MUN: added to the scores of a block.
    """

    k_BSGK: Tensor
    v_BSGV: Tensor
    units_MUN: Tensor
    documents: Documents
    position_M: Tensor
    block: int
    hidden: int = 0
    window: int | None = None
    bias_MUN: Tensor | None = None

    @classmethod
    def of_window(cls, k_BSGK: Tensor, v_BSGV: Tensor, window: int, position_M: Tensor, batch: int,
                  borders: CuSeqlens | None) -> KeySet:
        """The window as the own block of a query and the one before it, of blocks that are as long as the window."""
        block = max(LEAST_WINDOW_BLOCK, triton.cdiv(window - 1, LEAST_WINDOW_BLOCK) * LEAST_WINDOW_BLOCK)
        keys = k_BSGK.shape[1]
        documents = Documents.of(batch, len(position_M) // batch, keys, min(block, keys), borders, k_BSGK.device)
        own_M = (position_M - documents.first_M) // min(block, keys)
        units_M1N = torch.stack([own_M - 1, own_M], 1)[:, None]
        return cls(k_BSGK, v_BSGV, units_M1N, documents, position_M, min(block, keys), window=window)

    @property
    def num_blocks(self) -> int:
        """Blocks of all documents."""
        return len(self.documents.blocks_P2)

    @property
    def key_heads(self) -> int:
        """Key heads that have lists of their own."""
        return min(self.units_MUN.shape[1], self.k_BSGK.shape[2])

    def pairs(self, piece: slice) -> Pairs:
        """Sort the pairs of the queries `piece` by block and key head."""
        units_MUN = self.units_MUN[piece].long()
        lists, heads = units_MUN.shape[1], self.key_heads
        position_M11 = self.position_M[piece][:, None, None]
        begin_MUN = self.documents.first_M[piece][:, None, None] + units_MUN * self.block
        there_MUN = (units_MUN >= 0) & (begin_MUN <= position_M11 - self.hidden)
        if self.window is not None:
            there_MUN &= begin_MUN + self.block > position_M11 - self.window + 1
        head_U1 = (torch.arange(lists, device=units_MUN.device) // (lists // heads))[:, None]
        number_MUN = self.documents.base_M[piece][:, None, None] + units_MUN + head_U1 * self.num_blocks
        blocks = heads * self.num_blocks
        key = number_MUN.where(there_MUN, blocks).int().flatten()
        key, order = torch.sort(key, stable=True)
        first_pair_X1 = torch.searchsorted(key, torch.arange(blocks + 1, device=key.device, dtype=torch.int32))
        return Pairs(order.int(), first_pair_X1, there_MUN)
