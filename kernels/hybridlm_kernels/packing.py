"""Borders of packed documents, with their lengths on the host: no kernel launch waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class CuSeqlens:
    """Cumulative lengths of N documents laid end to end: `[0, n0, n0+n1, ...]`, N+1 numbers.

    The documents cover the flattened tokens (batch times time) of the tensors they describe, and none crosses
    a row, so the start of every row is among the numbers. Documents may not be empty.

    Raises:
        ValueError: borders that do not start at 0 or do not increase.
    """

    def __init__(self, borders: Sequence[int], device: torch.device | str = "cpu"):
        self.host: tuple[int, ...] = tuple(int(b) for b in borders)
        increasing = all(a < b for a, b in zip(self.host, self.host[1:], strict=False))
        if len(self.host) < 2 or self.host[0] != 0 or not increasing:
            raise ValueError(f"cu_seqlens must start at 0 and increase; got {list(self.host[:8])}")
        self.device = torch.device(device)
        self.cache: dict = {}  # layouts derived from the borders, by whoever derives them

    @classmethod
    def of(cls, borders: CuSeqlens | Tensor | Sequence[int], device: torch.device | str) -> CuSeqlens:
        """From what a caller has. A CUDA tensor costs one synchronisation; pass host numbers to avoid it."""
        if isinstance(borders, CuSeqlens):
            return borders
        return cls(borders.tolist() if isinstance(borders, Tensor) else borders, device)

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.host, self.host[1:], strict=False)]

    @property
    def num_documents(self) -> int:
        return len(self.host) - 1

    @property
    def num_tokens(self) -> int:
        return self.host[-1]

    def tensor(self) -> Tensor:
        """int32 [N+1] on the device."""
        if "tensor" not in self.cache:
            self.cache["tensor"] = torch.tensor(self.host, dtype=torch.int32, device=self.device)
        return self.cache["tensor"]

    def document_ids(self) -> Tensor:
        """int64 [tokens]: the document of every token."""
        if "document_ids" not in self.cache:
            ids = torch.repeat_interleave(torch.arange(self.num_documents), torch.tensor(self.lengths))
            self.cache["document_ids"] = ids.to(self.device)
        return self.cache["document_ids"]

    def positions(self) -> Tensor:
        """int64 [tokens]: each token's place in its document."""
        if "positions" not in self.cache:
            starts = torch.tensor(self.host[:-1], device=self.device)[self.document_ids()]
            self.cache["positions"] = torch.arange(self.num_tokens, device=self.device) - starts
        return self.cache["positions"]

    def first_keys(self, batch: int, queries: int) -> Tensor:
        """int64 [batch, queries]: where in its row the document begins, for the last `queries` tokens of each row."""
        position_BS = self.positions().view(batch, -1)
        return (torch.arange(position_BS.shape[1], device=self.device) - position_BS)[:, -queries:]

    def check(self, batch: int, length: int) -> None:
        """Raise ValueError unless the borders cover `batch` rows of `length` tokens with every row start."""
        if self.num_tokens != batch * length:
            raise ValueError(f"cu_seqlens ends at {self.num_tokens}, "
                             f"but the tensors hold {batch} x {length} tokens")
        if not set(range(0, batch * length, length)) <= set(self.host):
            raise ValueError(f"cu_seqlens lets a document cross a row of {length} tokens")
