"""First and last tokens of documents, for recurrences that run over whole rows and start anew where a document begins.

Legend: B rows, T tokens per row, N documents, M documents that have tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens


@dataclass(frozen=True)
class DocumentEnds:
    """The tokens at which documents begin and end, counted over the flattened B T tokens.

    `with_tokens` are the indices of the M documents that have tokens, None where all N have.
    """

    first_M: Tensor  # int64
    last_M: Tensor  # int64
    with_tokens: Tensor | None
    num_documents: int

    def at_documents(self, values_N: Tensor) -> Tensor:
        """The entries [M, ...] of the documents that have tokens."""
        return values_N if self.with_tokens is None else values_N.index_select(0, self.with_tokens)

    def final_states(self, h_X: Tensor, initial_N: Tensor | None) -> Tensor:
        """The states [N, ...] after the last token of every document.

        Args:
            h_X: states after every token, [B T, ...].
            initial_N: states before the first token, which documents without tokens keep; None is zero.
        """
        last_M = h_X.index_select(0, self.last_M)
        if self.with_tokens is None:
            return last_M
        kept = h_X.new_zeros(self.num_documents, *h_X.shape[1:]) if initial_N is None else initial_N.to(h_X.dtype)
        return kept.index_copy(0, self.with_tokens, last_M)


def find_document_ends(batch: int, length: int, borders: CuSeqlens | None, device: torch.device) -> DocumentEnds:
    """Find the ends of the documents of `batch` rows of `length` tokens; without borders each row is a document.

    >>> find_document_ends(1, 5, CuSeqlens([0, 2, 5]), torch.device("cpu")).last_M.tolist()
    [1, 4]
    """
    if borders is None:
        return _ends_of_rows(batch, length, device)
    key = ("document_ends", device)
    if key not in borders.cache:
        borders.cache[key] = _ends(borders.host, device)
    return borders.cache[key]


@lru_cache(maxsize=64)
def _ends_of_rows(batch: int, length: int, device: torch.device) -> DocumentEnds:
    return _ends(tuple(range(0, batch * length + 1, length)), device)


def _ends(borders: tuple[int, ...], device: torch.device) -> DocumentEnds:
    count = len(borders) - 1
    found = [n for n in range(count) if borders[n] < borders[n + 1]]
    with torch.inference_mode(False):  # kept tables may serve training after generation
        first, last, documents = (torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (
            [borders[n] for n in found], [borders[n + 1] - 1 for n in found], found))
    return DocumentEnds(first, last, None if len(found) == count else documents, count)
