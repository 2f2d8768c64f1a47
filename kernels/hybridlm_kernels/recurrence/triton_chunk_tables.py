"""Where the chunks of documents stand, as tables that Triton kernels read: one form for packed and plain batches.

Tokens are counted over the flattened batch times time. Tables come from lengths on the host; nothing waits for the
device, and they are kept with the borders they were made from.

Legend: B rows, T tokens a row, N documents, C tokens a chunk, P chunks, U pieces of documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens

CHUNK = 64
FEWEST_CHUNKS = 8  # of a piece: below that the states of pieces are too much traffic


class ChunkTables:
    """Chunks of documents that lie end to end at `borders` [N+1]. Chunks are in the order of their tokens."""

    def __init__(self, borders: Sequence[int], device: torch.device, chunk: int = CHUNK):
        self.borders, self.device, self.chunk = np.asarray(borders, dtype=np.int64), device, chunk
        self.lengths = np.diff(self.borders)
        counts = -(-self.lengths // chunk)
        self.first_chunks = np.concatenate([[0], np.cumsum(counts)])
        self.num_chunks, self.most_chunks = int(self.first_chunks[-1]), int(counts.max())
        document = np.repeat(np.arange(len(counts)), counts)
        first = self.borders[document] + (np.arange(self.num_chunks) - self.first_chunks[document]) * chunk
        self.chunks = self._tensor(np.stack([first, np.minimum(chunk, self.borders[document + 1] - first)], axis=1))
        self._pieces: dict[int, tuple[Tensor, Tensor]] = {}

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device, non_blocking=True)

    @property
    def documents(self) -> Tensor:
        """int64 [N, 4]: document, first token, end, first chunk; the longest document first."""
        return self.pieces(self.most_chunks)[0]

    def piece_length(self, programs: int, parallel: int, fewest: int) -> int:
        """Chunks of a piece, of as many pieces as keep a device busy that runs `parallel` programs, where whole
        documents are `programs` of them; `most_chunks` where that is less than `fewest` pieces a document."""
        pieces = min(parallel // programs, self.most_chunks // FEWEST_CHUNKS)
        return self.most_chunks if pieces < fewest else -(-self.most_chunks // pieces)

    def filling(self, heads: int, parallel: int) -> float:
        """How much of a device that runs `parallel` programs side by side is busy, while each of them takes the chunks
        of a document and head one after another. 0 where there is no device."""
        rounds = self.num_chunks * heads / (max(parallel, 1) * self.most_chunks)
        return rounds / math.ceil(rounds) if parallel else 0.0

    def pieces(self, chunks: int) -> tuple[Tensor, Tensor]:
        """Documents cut into pieces of so many chunks, for scans that are split.

        int64 [U, 4]: piece, first token, end, first chunk; the longest first. int64 [N, 2]: every document's first
        piece, and the piece behind its last. Pieces are numbered in the order of their tokens.
        """
        if chunks not in self._pieces:
            counts = -(-self.lengths // (chunks * self.chunk))
            ends = np.cumsum(counts)
            document = np.repeat(np.arange(len(counts)), counts)
            within = (np.arange(ends[-1]) - (ends - counts)[document]) * chunks
            first = self.borders[document] + within * self.chunk
            end = np.minimum(first + chunks * self.chunk, self.borders[document + 1])
            table = np.stack([np.arange(ends[-1]), first, end, self.first_chunks[document] + within], axis=1)
            table = table[np.argsort(first - end, kind="stable")]
            self._pieces[chunks] = self._tensor(table), self._tensor(np.stack([ends - counts, ends], axis=1))
        return self._pieces[chunks]


def chunk_tables(batch: int, length: int, borders: CuSeqlens | None, device: torch.device,
                 chunk: int = CHUNK) -> ChunkTables:
    """The tables of a batch; packed ones are kept with their borders, plain ones by their size."""
    if borders is None:
        return _plain_tables(batch, length, device, chunk)
    key = ("chunk_tables", device, chunk)
    if key not in borders.cache:
        borders.cache[key] = ChunkTables(borders.host, device, chunk)
    return borders.cache[key]


@lru_cache(maxsize=64)
def _plain_tables(batch: int, length: int, device: torch.device, chunk: int) -> ChunkTables:
    return ChunkTables(range(0, batch * length + 1, length), device, chunk)
