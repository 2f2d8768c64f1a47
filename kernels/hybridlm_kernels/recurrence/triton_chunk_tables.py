"""Tables of the chunks of documents, which Triton kernels read: one form for packed and plain batches.

Tokens are counted over the flattened batch times time. Tables come from lengths on the host, so nothing waits for the
device, and they are kept with the borders they were made from.

Legend: B rows, T tokens per row, N documents, C tokens per chunk, P chunks, U segments of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.triton_support import copy_table, keep_for_graphs

CHUNK_TOKENS = 64
MIN_CHUNKS_PER_SEGMENT = 8  # in shorter segments the states between them are too much traffic


class ChunkTables:
    """Chunks of documents that lie end to end at `borders` [N+1]. Chunks are in the order of their tokens.

    `shared` tables serve later calls, on any stream.
    """

    def __init__(self, borders: Sequence[int], device: torch.device, chunk: int = CHUNK_TOKENS, shared: bool = False):
        self.borders = np.asarray(borders, dtype=np.int64)
        self.device = device
        self.chunk = chunk
        self.shared = shared
        self.lengths = np.diff(self.borders)
        counts = -(-self.lengths // chunk)
        self.first_chunks = np.concatenate([[0], np.cumsum(counts)])
        self.num_chunks = int(self.first_chunks[-1])
        self.max_chunks = int(counts.max())  # of the longest document
        document = np.repeat(np.arange(len(counts)), counts)
        first = self.borders[document] + (np.arange(self.num_chunks) - self.first_chunks[document]) * chunk
        # int64 [P, 2]: first token of every chunk, and its tokens.
        self.chunks = self._to_device(np.stack([first, np.minimum(chunk, self.borders[document + 1] - first)], axis=1))
        self._segments: dict[int, tuple[Tensor, Tensor]] = {}

    def _to_device(self, array: np.ndarray) -> Tensor:
        return copy_table(array, self.device, self.shared)

    @property
    def documents(self) -> Tensor:
        """Document, first token, end and first chunk of every document, int64 [N, 4]; the longest document first."""
        return self.segments(self.max_chunks)[0]

    def chunks_per_segment(self, programs: int, parallel: Callable[[], int], min_segments: int) -> int:
        """Chunks per segment, for as many segments as keep the device busy.

        Args:
            programs: programs of a scan over uncut documents.
            parallel: finds how many programs the device runs side by side; not called where documents are too short.
            min_segments: fewest segments per document that are worth a second scan.

        Returns:
            `max_chunks`, which leaves every document uncut, where fewer than `min_segments` would be made of one.
        """
        segments = self.max_chunks // MIN_CHUNKS_PER_SEGMENT
        if segments >= min_segments:
            segments = min(segments, parallel() // programs)
        return self.max_chunks if segments < min_segments else -(-self.max_chunks // segments)

    def segments(self, chunks: int) -> tuple[Tensor, Tensor]:
        """Documents cut into segments of `chunks` chunks, to be scanned side by side.

        Returns:
            int64 [U, 4]: segment, first token, end and first chunk of every segment; the longest first.
            int64 [N, 2]: every document's first segment, and the segment behind its last. Segments are numbered in the
            order of their tokens.
        """
        if chunks not in self._segments:
            counts = -(-self.lengths // (chunks * self.chunk))
            ends = np.cumsum(counts)
            document = np.repeat(np.arange(len(counts)), counts)
            within = (np.arange(ends[-1]) - (ends - counts)[document]) * chunks
            first = self.borders[document] + within * self.chunk
            end = np.minimum(first + chunks * self.chunk, self.borders[document + 1])
            table = np.stack([np.arange(ends[-1]), first, end, self.first_chunks[document] + within], axis=1)
            table = table[np.argsort(first - end, kind="stable")]
            of_documents = np.stack([ends - counts, ends], axis=1)
            self._segments[chunks] = self._to_device(table), self._to_device(of_documents)
        return self._segments[chunks]


def get_chunk_tables(batch: int, length: int, borders: CuSeqlens | None, device: torch.device,
                     chunk: int = CHUNK_TOKENS) -> ChunkTables:
    """The tables of a batch; those of packed batches are kept with their borders, plain ones by their size."""
    if borders is None:
        return keep_for_graphs(_tables_of_plain_rows(batch, length, device, chunk))
    key = ("chunk_tables", device, chunk)
    if key not in borders.cache:
        borders.cache[key] = ChunkTables(borders.host, device, chunk)
    return keep_for_graphs(borders.cache[key])


@lru_cache(maxsize=4096)
def _tables_of_plain_rows(batch: int, length: int, device: torch.device, chunk: int) -> ChunkTables:
    return ChunkTables(range(0, batch * length + 1, length), device, chunk, shared=True)
