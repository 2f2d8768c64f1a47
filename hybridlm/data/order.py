"""The window that each sample reads: a pure function of (seed, sample index).

Samples come in blocks. A block holds a fixed number of samples of every source, in an order of its own; each
source walks through its own windows, epoch after epoch, each epoch in a new order. Nothing is remembered, so a
run resumes from the number of samples it has seen, whatever its batch size and number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from hybridlm.data.permutation import Permutation

MAX_BLOCK_SAMPLES = 1000


class WindowPlace(NamedTuple):
    """The window number `window` of source number `source`, read in epoch number `epoch` of that source."""

    source: int
    epoch: int
    window: int


def block_counts(weights: Sequence[float]) -> list[int]:
    """Count the samples of every source in one block, the smallest that meets the weights exactly.

    Weights that need more than MAX_BLOCK_SAMPLES samples are rounded to that block by largest remainders; no source
    falls below one sample per block.

    Args:
        weights: one positive number per source.

    Raises:
        ValueError: no weights, or one that is not positive.

    >>> block_counts([3, 1]), block_counts([0.5, 0.25, 0.25])
    ([3, 1], [2, 1, 1])
    """
    if not weights or min(weights) <= 0:
        raise ValueError(f"mixture weights must be positive; got {list(weights)}")
    total = float(sum(weights))
    fractions = [w / total for w in weights]
    for size in range(1, MAX_BLOCK_SAMPLES + 1):
        if all(abs(s * size - round(s * size)) < 1e-9 * size and round(s * size) > 0 for s in fractions):
            return [round(s * size) for s in fractions]
    counts = [max(1, int(s * MAX_BLOCK_SAMPLES)) for s in fractions]
    by_remainder = sorted(range(len(fractions)), key=lambda i: (counts[i] - fractions[i] * MAX_BLOCK_SAMPLES, i))
    for i in by_remainder[:max(0, MAX_BLOCK_SAMPLES - sum(counts))]:
        counts[i] += 1
    return counts


class SampleOrder:
    """The order of samples over several sources, mixed by weight.

    Args:
        windows: windows of each source, at least one.
        weights: weight of each source.
        seed: of the order.
        shuffle: False keeps the windows of a source, and the sources in a block, in their own order.

    >>> order = SampleOrder([4, 2], weights=[2, 1], seed=0, shuffle=False)
    >>> [tuple(order.place(index)) for index in range(4)]
    [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 0, 2)]
    """

    def __init__(self, windows: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True):
        if min(windows, default=0) < 1:
            raise ValueError(f"every source needs at least one window; got {list(windows)}")
        self.windows, self.seed, self.shuffle = list(windows), seed, shuffle
        self.counts = block_counts(weights)
        self.block = sum(self.counts)
        self._permutation = lru_cache(maxsize=64)(Permutation)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_permutation"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._permutation = lru_cache(maxsize=64)(Permutation)

    def place(self, index: int) -> WindowPlace:
        """Find the window of sample `index`, which counts from 0 without end.

        Raises:
            IndexError: a negative index.
        """
        if index < 0:
            raise IndexError(f"sample indices start at 0; got {index}")
        block, slot = divmod(index, self.block)
        if self.shuffle and len(self.counts) > 1:
            slot = self._permutation(self.block, self.seed, "block", block)(slot)
        source = 0
        while slot >= self.counts[source]:
            slot -= self.counts[source]
            source += 1
        epoch, window = divmod(block * self.counts[source] + slot, self.windows[source])
        if self.shuffle:
            window = self._permutation(self.windows[source], self.seed, "epoch", source, epoch)(window)
        return WindowPlace(source, epoch, window)

    def epochs(self, num_samples: int) -> list[float]:
        """Epochs of each source after `num_samples` samples, as if these were complete blocks."""
        return [num_samples * count / self.block / size
                for count, size in zip(self.counts, self.windows, strict=True)]
