"""Global batches, cut into the micro batches that go through the model at once, and made one step ahead."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from hybridlm.data.packing import Batch, PackedDataset


def micro_batches(dataset: PackedDataset, indices: Sequence[int], size: int | None) -> Iterator[Batch]:
    """Batches of at most `size` of the samples with these indices; None: one of all."""
    size = size or len(indices)
    for start in range(0, len(indices), size):
        yield dataset.batch(indices[start:start + size])


def global_batches(dataset: PackedDataset, *, first_sample: int, batch_size: int, rows: range,
                   micro_batch_size: int | None, pin: bool = False) -> Generator[list[Batch], None, None]:
    """Make the micro batches of this rank's `rows` of every global batch, from the one that starts with `first_sample`.

    While a step computes, a thread makes the micro batches of the next. The batch that starts with sample n is the same
    whenever it is asked for, so nothing here is saved. Close the iterator to end its thread.
    """

    def make(first: int) -> list[Batch]:
        batches = micro_batches(dataset, [first + row for row in rows], micro_batch_size)
        return [batch.pin_memory() if pin else batch for batch in batches]

    with ThreadPoolExecutor(1, "loader") as pool:
        ahead = pool.submit(make, first_sample)
        for following in count(first_sample + batch_size, batch_size):
            ready = ahead.result()
            ahead = pool.submit(make, following)
            yield ready
