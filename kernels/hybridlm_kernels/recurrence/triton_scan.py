"""Parts of the Triton scans of channels: the step of two steps, and the table of documents with their tiles.

Legend: B rows, T tokens per row, N documents, P tiles of all documents.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.triton_support import copy_table, keep_for_graphs


@triton.jit
def combine(a_left, h_left, a_right, h_right):
    """The step of two steps: factors multiply, and the state of the left is carried through the right."""
    return a_left * a_right, a_right * h_left + h_right


def document_tiles(batch: int, length: int, borders: CuSeqlens | None, device: torch.device,
                   tile_tokens: int) -> tuple[Tensor, int]:
    """Find the documents of a batch and their tiles; kept with the borders, or by the size of the batch.

    Args:
        batch: rows.
        length: tokens per row.
        borders: of packed documents; None where each row is a document.
        device: where the table is needed.
        tile_tokens: tokens per tile.

    Returns:
        First token, length and first tile of every document, int64 [N, 3], and the number P of tiles.
    """
    if borders is None:
        return keep_for_graphs(_tiles_of_rows(batch, length, device, tile_tokens))
    key = ("document_tiles", device, tile_tokens)
    if key not in borders.cache:
        borders.cache[key] = _table(borders.host, device, tile_tokens, shared=False)
    return keep_for_graphs(borders.cache[key])


@lru_cache(maxsize=4096)
def _tiles_of_rows(batch: int, length: int, device: torch.device, tile_tokens: int) -> tuple[Tensor, int]:
    return _table(tuple(range(0, batch * length + 1, length)), device, tile_tokens, shared=True)


def _table(borders: tuple[int, ...], device: torch.device, tile_tokens: int, shared: bool) -> tuple[Tensor, int]:
    edges = np.asarray(borders, dtype=np.int64)
    lengths = np.diff(edges)
    tiles = -(-lengths // tile_tokens)
    table = np.stack([edges[:-1], lengths, np.cumsum(tiles) - tiles], axis=1)
    return copy_table(table, device, shared), int(tiles.sum())
