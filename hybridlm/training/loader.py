"""Global batches from a data set that is a pure function of the sample index, made one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol


class Samples(Protocol):
    def sample(self, index: int) -> Any: ...


Collate = Callable[[Sequence[Any]], Any]


class Loader:
    """The parts of one global batch after another; part i holds `micro_batch_size` of this rank's `rows`.

    While a step computes, a thread makes the next step's parts. Nothing of this is remembered: the batch that
    starts with sample n is the same whenever it is asked for.
    """

    def __init__(self, samples: Samples, collate: Collate, *, batch_size: int, micro_batch_size: int | None,
                 rows: range, first_sample: int):
        self.samples, self.collate = samples, collate
        self.batch_size, self.rows = batch_size, rows
        self.micro_batch_size = min(micro_batch_size or len(rows), len(rows))
        self.next_sample = first_sample
        self._pool = ThreadPoolExecutor(1, "loader")
        self._ahead: Future[list[Any]] = self._pool.submit(self.parts, first_sample)

    def parts(self, first_sample: int) -> list[Any]:
        """This rank's parts of the global batch that starts with `first_sample`."""
        indices = [first_sample + row for row in self.rows]
        step = self.micro_batch_size
        return [self.collate([self.samples.sample(index) for index in indices[start:start + step]])
                for start in range(0, len(indices), step)]

    def __next__(self) -> list[Any]:
        parts = self._ahead.result()
        self.next_sample += self.batch_size
        self._ahead = self._pool.submit(self.parts, self.next_sample)
        return parts

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
