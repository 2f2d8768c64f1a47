"""Borders of packed documents, with their lengths on the host: no kernel launch waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from weakref import WeakValueDictionary

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
        host = tuple(int(b) for b in borders)
        decreasing = any(a > b for a, b in pairwise(host))
        if len(host) < 2 or host[0] != 0 or decreasing or host[-1] == 0:
            raise ValueError("cu_seqlens must start at 0, never decrease and hold at least one token; "
                             f"got {list(host[:8])}")
        self._host: tuple[int, ...] | None = host
        self.table = torch.tensor(host, device="cpu")  # the same numbers, int64: all that a compiled graph gets
        self.num_tokens = host[-1]
        _by_memory[self.table.data_ptr()] = self
        self.device = torch.device(device)
        self.cache: dict = {}  # what operations derive from the borders, by a name of their own

    @classmethod
    def of(cls, borders: CuSeqlens | Tensor | Sequence[int], device: torch.device | str,
           num_tokens: int = 0) -> CuSeqlens:
        """Borders from a list, a tensor or borders; a CUDA tensor costs one synchronisation, host numbers none.

        A table [1, N+1], the form of collators that add a row to every tensor, is read as its row.

        Args:
            borders: in any of these forms.
            device: where tables made from the borders will be needed.
            num_tokens: the tokens that a table must cover that torch.compile traces, and cannot read.

        Raises:
            ValueError: a tensor of another shape, or of numbers that are no integers.
        """
        if isinstance(borders, CuSeqlens):
            return borders
        if torch.compiler.is_dynamo_compiling():
            return TracedBorders(borders if isinstance(borders, Tensor) else torch.tensor(borders), num_tokens, device)
        table = borders.cpu().numpy() if isinstance(borders, Tensor) else np.asarray(borders)
        if table.dtype.kind not in "iu":
            raise ValueError(f"cu_seqlens must be integers; got {table.dtype}")
        if table.ndim == 2 and table.shape[0] == 1:
            table = table[0]
        if table.ndim != 1:
            raise ValueError("cu_seqlens must be one table [documents + 1] of borders over the flattened tokens of all "
                             f"rows; got shape {list(table.shape)}")
        return cls(table.tolist(), device)

    @classmethod
    def of_table(cls, table: Tensor, device: torch.device) -> CuSeqlens:
        """Borders from the `table` of others, with what operations have derived from them before.

        Tables without numbers (those of torch.compile's shapes) make borders that only know `num_documents`.
        """
        if type(table) is not Tensor:
            return TracedBorders(table, 0, device)
        known = _by_memory.get(table.data_ptr())  # it owns this memory, so the numbers are the same
        return _of_numbers(tuple(table.tolist()), device) if known is None or known.device != device else known

    def to(self, device: torch.device) -> CuSeqlens:
        """The same borders for tables on another device."""
        if device == self.device:
            return self
        if torch.compiler.is_dynamo_compiling():
            return TracedBorders(self.table, self.num_tokens, device)
        return CuSeqlens(self.host, device)

    @property
    def host(self) -> tuple[int, ...]:
        """The borders as numbers."""
        if self._host is None:
            self._host = tuple(self.table.tolist())
        return self._host

    @property
    def lengths(self) -> list[int]:
        """Tokens per document."""
        return [b - a for a, b in zip(self.host, self.host[1:], strict=False)]

    @property
    def num_documents(self) -> int:
        """Number of documents, N, empty ones included."""
        return self.table.shape[0] - 1

    @property
    def filled(self) -> CuSeqlens:
        """The borders of the documents that have tokens; these borders themselves where all have some."""
        if torch.compiler.is_dynamo_compiling():
            return self  # empty documents are left out when the graph runs
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

    def in_rows(self, rows: int) -> CuSeqlens:
        """Borders of the same documents where every token is so many rows.

        >>> CuSeqlens([0, 2, 5]).in_rows(2).host
        (0, 4, 10)
        """
        if torch.compiler.is_dynamo_compiling():
            return TracedBorders(self.table * rows, self.num_tokens * rows, self.device)
        key = ("in_rows", rows)
        if key not in self.cache:
            self.cache[key] = CuSeqlens([rows * border for border in self.host], self.device)
        return self.cache[key]

    def tensor(self) -> Tensor:
        """The borders as a tensor on the device, int32 [N+1]."""
        return self._derive("tensor", lambda: self.table.to(self.device, torch.int32))

    def ends(self) -> Tensor:
        """The end of every document, int64 [N] on the device."""
        return self._derive("ends", lambda: self.table[1:].to(self.device))

    def document_ids(self) -> Tensor:
        """Number of the document of every token, int64 [tokens]."""
        def make() -> Tensor:
            if torch.compiler.is_dynamo_compiling():
                return torch.searchsorted(self.ends(), torch.arange(self.num_tokens, device=self.device), right=True)
            return torch.repeat_interleave(torch.arange(self.num_documents), self.table.diff()).to(self.device)

        return self._derive("document_ids", make)

    def positions(self) -> Tensor:
        """Position of every token in its document, int64 [tokens]."""
        def make() -> Tensor:
            starts = self.table[:-1].to(self.device)[self.document_ids()]
            return torch.arange(self.num_tokens, device=self.device) - starts

        return self._derive("positions", make)

    def _derive(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Make it once, and keep it for later calls; a graph that torch.compile traces keeps nothing."""
        if torch.compiler.is_dynamo_compiling():
            return make()
        if name not in self.cache:
            self.cache[name] = make()
        return self.cache[name]

    def first_keys(self, batch: int, queries: int) -> Tensor:
        """First position of the document of each of the last `queries` tokens per row, int64 [batch, queries]."""
        position_BS = self.positions().view(batch, -1)
        return (torch.arange(position_BS.shape[1], device=self.device) - position_BS)[:, -queries:]

    def check(self, batch: int, length: int) -> None:
        """Raises ValueError unless the borders cover `batch` rows of `length` tokens with every row start."""
        if self.num_tokens != batch * length:
            raise ValueError(f"cu_seqlens ends at {self.num_tokens}, "
                             f"but the tensors hold {batch} x {length} tokens")
        if torch.compiler.is_dynamo_compiling():
            return  # the operations look at the numbers when the graph runs
        if not set(range(0, batch * length, length)) <= set(self.host):
            raise ValueError(f"cu_seqlens lets a document cross a row of {length} tokens")


class TracedBorders(CuSeqlens):
    """Borders while torch.compile traces a graph: a table without numbers, of which the size alone is known."""

    def __init__(self, table: Tensor, num_tokens: int, device: torch.device | str):
        if table.dim() == 2 and table.shape[0] == 1:
            table = table[0]
        if table.dim() != 1:
            raise ValueError("cu_seqlens must be one table [documents + 1] of borders over the flattened tokens of all "
                             f"rows; got shape {list(table.shape)}")
        self._host = None
        self.table = table.to("cpu", torch.int64)
        self.num_tokens = num_tokens
        self.device = torch.device(device)
        self.cache = {}


_by_memory: WeakValueDictionary[int, CuSeqlens] = WeakValueDictionary()  # by the address of their tables


@lru_cache(maxsize=4)  # of a batch or two: each holds tables as large as the batch
def _of_numbers(borders: tuple[int, ...], device: torch.device) -> CuSeqlens:
    return CuSeqlens(borders, device)
