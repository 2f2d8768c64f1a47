"""Global batches, cut into the parts that go through the model at once, and made one step ahead."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from hybridlm.data.packing import Batch, PackedDataset


def parts(dataset: PackedDataset, indices: Sequence[int], micro_batch_size: int | None) -> Iterator[Batch]:
    """Batches of at most `micro_batch_size` of the samples."""
    size = micro_batch_size or len(indices)
    for start in range(0, len(indices), size):
        yield dataset.batch(indices[start:start + size])


def global_batches(dataset: PackedDataset, *, first_sample: int, batch_size: int, rows: range,
                   micro_batch_size: int | None, pin: bool = False) -> Generator[list[Batch], None, None]:
    """The parts of this rank's `rows` of every global batch, from the one that starts with `first_sample` on.

    While a step computes, a thread makes the next one's parts. The batch that starts with sample n is the same
    whenever it is asked for, so nothing here is saved. Close the iterator to end its thread.
    """

    def make(first: int) -> list[Batch]:
        batches = parts(dataset, [first + row for row in rows], micro_batch_size)
        return [batch.pin_memory() if pin else batch for batch in batches]

    with ThreadPoolExecutor(1, "loader") as pool:
        ahead = pool.submit(make, first_sample)
        for following in count(first_sample + batch_size, batch_size):
            ready = ahead.result()
            ahead = pool.submit(make, following)
            yield ready
