"""Tiles of queries and keys of the forgetting attention kernels: their sizes, which program has which, and their rows.

B rows, T queries and S keys per row (the queries are the last T positions), P tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.triton_support import copy_table, keep_for_graphs


@triton.jit
def find_tile(tiles_ptr, T, S, B, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile of a program: the first query and key of its document, the number of its keys before its queries, that
    of its queries, and the first token of the tile in it. Tiles with most pairs come first.
    """
    program = tl.program_id(0)
    if tiles_ptr is not None:
        row = tiles_ptr + program.to(tl.int64) * 4
        first, queries, start = tl.load(row), tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
        return first, first, queries - queries, queries, start
    else:
        b = (program % B).to(tl.int64)
        most = tl.cdiv(S if OF_KEYS else T, BLOCK) - 1
        index = tl.minimum(program // B, most)
        if not OF_KEYS:
            index = tl.maximum(most - index, 0)
        return b * T, b * S, tl.maximum(S - T, 0), T, index * BLOCK


@triton.jit
def first_query_tile(tiles_ptr, T, B, QUERIES: tl.constexpr):
    """The number of the first tile of so many queries of a program's document, among those of all documents."""
    program = tl.program_id(0).to(tl.int64)
    if tiles_ptr is not None:
        return tl.load(tiles_ptr + program * 4 + 3)
    else:
        return program % B * tl.cdiv(T, QUERIES)


@triton.jit
def first_key_to_read(first_ptr, tiles_ptr, start, b, h, window, T, B, num_tiles, QUERIES: tl.constexpr,
                      BLOCK_S: tl.constexpr):
    """The key at which the queries from `start` on begin, the first of its tile; b is the first query's place among
    keys, and QUERIES those of the tiles of `first_ptr`.
    """
    begin = b - b
    if window is not None:
        begin = tl.maximum(b - window + 1, 0)
    if first_ptr is not None:
        tile = first_query_tile(tiles_ptr, T, B, QUERIES) + start // QUERIES
        begin = tl.maximum(begin, tl.load(first_ptr + h * num_tiles + tile))
    return begin // BLOCK_S * BLOCK_S


@triton.jit
def load_rows(ptr, start, last, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """Loads [ROWS, PADDED] from row `start` on, rows `stride` apart; rows behind the `last` repeat it."""
    row, column = tl.minimum(tl.arange(0, ROWS), tl.maximum(last - start, 0)), tl.arange(0, PADDED)
    at = ptr + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if PADDED == COLUMNS:
        return tl.load(at)
    else:
        return tl.load(at, mask=(column < COLUMNS)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, start, last, stride, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """Stores [ROWS, PADDED] where `load_rows` loads it, without rows behind the last."""
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = ptr + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(row <= last - start)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def difference(high_t, low_t, high_s, low_s):
    """F_t - F_s from the parts of both sums."""
    return (high_t - high_s) + (low_t - low_s)


class TileSizes(NamedTuple):
    """Compile-time sizes of head dims and tiles; `forward`, `dq` and `dk` are queries and keys of a tile."""

    K0: int
    V0: int
    forward: tuple[int, int]
    dq: tuple[int, int]
    dk: tuple[int, int]

    @classmethod
    def of(cls, dtype: torch.dtype, key_dim: int, value_dim: int, queries: int) -> TileSizes:
        """Sizes for a dtype, head dims and the number of queries per row."""
        K0, V0 = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
        wide = max(K0, V0) > 128
        if dtype == torch.float32:
            keys = 16 if wide else 32
            return cls(K0, V0, (32, keys), (32, keys), (keys, 32))
        if queries < 16:  # of decoding
            return cls(K0, V0, (16, 64), (16, 64), (16, 64))
        if wide:
            return cls(K0, V0, (128, 32), (64, 32), (32, 64))
        return cls(K0, V0, (128, 64), (128, 64), (32, 128))

    def sizes(self, tile: tuple[int, int]) -> dict[str, int]:
        """The sizes by the names of kernel arguments."""
        return {"K0": self.K0, "V0": self.V0, "BLOCK_T": tile[0], "BLOCK_S": tile[1]}


def tiles_of(batch: int, length: int, borders: CuSeqlens | None, device: torch.device, block: int, of_keys: bool,
             query_tile: int) -> tuple[Tensor | None, int]:
    """The tiles of packed documents and their number; rows of one document each need no table.

    Args:
        batch: B.
        length: tokens per row.
        borders: of packed documents; None where each row is one.
        device: where the table is read.
        block: tokens per tile.
        of_keys: tiles of keys, not of queries.
        query_tile: queries per tile in `first_query_tile`.

    Returns:
        First token and length of the document, the tile's first token in it, and the number of the document's first
        tile of queries, int64 [P, 4]. Tiles with most pairs come first.
    """
    if borders is None:
        return None, batch * triton.cdiv(length, block)
    key = ("forgetting_attention_tiles", device, block, of_keys, query_tile)
    if key not in borders.cache:
        lengths = np.asarray(borders.lengths, dtype=np.int64)
        counts = -(-lengths // block)
        document = np.repeat(np.arange(len(counts)), counts)
        start = (np.arange(len(document)) - (np.cumsum(counts) - counts)[document]) * block
        query_tiles = -(-lengths // query_tile)
        table = np.stack([np.asarray(borders.host, dtype=np.int64)[document], lengths[document], start,
                          (np.cumsum(query_tiles) - query_tiles)[document]], axis=1)
        pairs = lengths[document] - start if of_keys else start
        borders.cache[key] = copy_table(table[np.argsort(-pairs, kind="stable")], device)
    return keep_for_graphs(borders.cache[key]), len(borders.cache[key])
