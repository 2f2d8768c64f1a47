"""Borders of packed documents, with their lengths on the host: no kernel launch waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class CuSeqlens:
    """Cumulative lengths of N documents laid end to end: `[0, n0, n0+n1, ...]`, N+1 numbers.

    The documents cover the flattened tokens (batch times time) of the tensors they describe, and none crosses
    a row, so the start of every row is among the numbers. Documents may be empty: a table padded to a fixed size
    repeats its last border, and a request without tokens repeats the border before it.

    Raises:
        ValueError: borders that do not start at 0, decrease, or hold no token.

    >>> borders = CuSeqlens([0, 2, 5])
    >>> borders.lengths, borders.positions()
    ([2, 3], tensor([0, 1, 0, 1, 2]))
    >>> CuSeqlens([0, 2, 2, 5, 5]).filled.lengths
    [2, 3]
    """

    def __init__(self, borders: Sequence[int], device: torch.device | str = "cpu"):
        self.host: tuple[int, ...] = tuple(int(b) for b in borders)
        decreasing = any(a > b for a, b in zip(self.host, self.host[1:], strict=False))
        if len(self.host) < 2 or self.host[0] != 0 or decreasing or self.host[-1] == 0:
            raise ValueError("cu_seqlens must start at 0, never decrease and hold at least one token; "
                             f"got {list(self.host[:8])}")
        self.device = torch.device(device)
        self.cache: dict = {}  # what operations derive from the borders, by a name of their own

    @classmethod
    def of(cls, borders: CuSeqlens | Tensor | Sequence[int], device: torch.device | str) -> CuSeqlens:
        """Borders from a list, a tensor or borders; a CUDA tensor costs one synchronisation, host numbers none.

        A table [1, N+1], the form of collators that add a row to every tensor, is read as its row.

        Raises:
            ValueError: a tensor of another shape, or of numbers that are no integers.
        """
        if isinstance(borders, CuSeqlens):
            return borders
        table = borders.cpu().numpy() if isinstance(borders, Tensor) else np.asarray(borders)
        if table.dtype.kind not in "iu":
            raise ValueError(f"cu_seqlens must be integers; got {table.dtype}")
        if table.ndim == 2 and table.shape[0] == 1:
            table = table[0]
        if table.ndim != 1:
            raise ValueError("cu_seqlens must be one table [documents + 1] of borders over the flattened tokens of all "
                             f"rows; got shape {list(table.shape)}")
        return cls(table.tolist(), device)

    @property
    def lengths(self) -> list[int]:
        """Tokens per document."""
        return [b - a for a, b in zip(self.host, self.host[1:], strict=False)]

    @property
    def num_documents(self) -> int:
        """Number of documents, N, empty ones included."""
        return len(self.host) - 1

    @property
    def filled(self) -> CuSeqlens:
        """The borders of the documents that have tokens; these borders themselves where all have some."""
        if "filled" not in self.cache:
            borders = sorted(set(self.host))
            self.cache["filled"] = self if len(borders) == len(self.host) else CuSeqlens(borders, self.device)
        return self.cache["filled"]

    def filled_documents(self) -> Tensor:
        """Numbers of the documents that have tokens, int64 on the device."""
        if "filled_documents" not in self.cache:
            numbers = [n for n, length in enumerate(self.lengths) if length]
            self.cache["filled_documents"] = torch.tensor(numbers, device=self.device)
        return self.cache["filled_documents"]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return self.host[-1]

    def tensor(self) -> Tensor:
        """The borders as a tensor on the device, int32 [N+1]."""
        if "tensor" not in self.cache:
            self.cache["tensor"] = torch.tensor(self.host, dtype=torch.int32, device=self.device)
        return self.cache["tensor"]

    def document_ids(self) -> Tensor:
        """Number of the document of every token, int64 [tokens]."""
        if "document_ids" not in self.cache:
            ids = torch.repeat_interleave(torch.arange(self.num_documents), torch.tensor(self.lengths))
            self.cache["document_ids"] = ids.to(self.device)
        return self.cache["document_ids"]

    def positions(self) -> Tensor:
        """Position of every token in its document, int64 [tokens]."""
        if "positions" not in self.cache:
            starts = torch.tensor(self.host[:-1], device=self.device)[self.document_ids()]
            self.cache["positions"] = torch.arange(self.num_tokens, device=self.device) - starts
        return self.cache["positions"]

    def first_keys(self, batch: int, queries: int) -> Tensor:
        """First position of the document of each of the last `queries` tokens per row, int64 [batch, queries]."""
        position_BS = self.positions().view(batch, -1)
        return (torch.arange(position_BS.shape[1], device=self.device) - position_BS)[:, -queries:]

    def check(self, batch: int, length: int) -> None:
        """Raises ValueError unless the borders cover `batch` rows of `length` tokens with every row start."""
        if self.num_tokens != batch * length:
            raise ValueError(f"cu_seqlens ends at {self.num_tokens}, "
                             f"but the tensors hold {batch} x {length} tokens")
        if not set(range(0, batch * length, length)) <= set(self.host):
            raise ValueError(f"cu_seqlens lets a document cross a row of {length} tokens")
