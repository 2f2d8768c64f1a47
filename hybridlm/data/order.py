"""The window that each sample reads: a pure function of (seed, sample index).

Samples come in blocks, each in an order of its own; each source walks through its own windows, epoch after epoch, each
epoch in a new order. Nothing is remembered, so a run resumes from the number of samples it has seen, whatever its batch
size and number of ranks.

Where a block of at most MAX_BLOCK_SAMPLES samples meets the weights exactly, every block holds the same number of
samples of every source. Otherwise a block of MAX_BLOCK_SAMPLES samples holds the whole part of what each source is due,
and the places that are left go to the sources by a rotation: place j of all blocks reads the source in whose interval
the point (phase + j * step) mod size lies. With step / size near the golden ratio the points of any stretch are spread
evenly (three-distance theorem), so a source of weight 1e-6 is read once in about a million samples. How often a source
was read before a place is a sum of floors, found in O(log size) steps as by Euclid's algorithm.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import gcd
from typing import NamedTuple

from hybridlm.data.permutation import Permutation

MAX_BLOCK_SAMPLES = 1000
PERIOD_SAMPLES = 1 << 40  # samples in which weights that no block meets are met, up to one sample per source


class WindowPlace(NamedTuple):
    """The window number `window` of source number `source`, read in epoch number `epoch` of that source."""

    source: int
    epoch: int
    window: int


def block_counts(weights: Sequence[float]) -> list[int]:
    """Count the samples of every source in the smallest number of samples that meets the weights.

    Weights that need more than MAX_BLOCK_SAMPLES samples are rounded to PERIOD_SAMPLES by largest remainders, at least
    one sample per source.

    Args:
        weights: one positive number per source.

    Raises:
        ValueError: no weights, or one that is not positive.

    >>> block_counts([3, 1]), block_counts([0.5, 0.25, 0.25])
    ([3, 1], [2, 1, 1])
    >>> rare = block_counts([1, 1e-5])
    >>> round(sum(rare) / rare[1])
    100001
    """
    if not weights or min(weights) <= 0:
        raise ValueError(f"mixture weights must be positive; got {list(weights)}")
    total = float(sum(weights))
    fractions = [w / total for w in weights]
    for size in range(1, MAX_BLOCK_SAMPLES + 1):
        if all(abs(s * size - round(s * size)) < 1e-9 * size and round(s * size) > 0 for s in fractions):
            return [round(s * size) for s in fractions]
    return _largest_remainders(fractions, PERIOD_SAMPLES)


def _largest_remainders(fractions: Sequence[float], size: int) -> list[int]:
    """Round fractions of `size` to whole numbers, at least 1 each, that add up to `size` where there is room."""
    counts = [max(1, int(s * size)) for s in fractions]
    by_remainder = sorted(range(len(fractions)), key=lambda i: (counts[i] - fractions[i] * size, i))
    for i in by_remainder[:max(0, size - sum(counts))]:
        counts[i] += 1
    return counts


def floor_sum(count: int, modulus: int, step: int, start: int) -> int:
    """The sum of floor((step * i + start) / modulus) over i = 0 .. count - 1, for non-negative arguments.

    It takes O(log modulus) steps: counting lattice points under a line, axes exchanged as in Euclid's algorithm
    (Graham, Knuth, Patashnik: Concrete Mathematics, section 3.5).

    >>> floor_sum(5, 7, 3, 2) == sum((3 * i + 2) // 7 for i in range(5))
    True
    """
    total = 0
    while count > 0:
        whole, step = divmod(step, modulus)
        total += whole * (count * (count - 1) // 2)
        whole, start = divmod(start, modulus)
        total += whole * count
        top = step * count + start
        count, start = divmod(top, modulus)
        modulus, step = step, modulus
        if modulus == 0:
            break
    return total


class _Rotation:
    """The source of each place of blocks that no source fills whole: see the top of this file.

    Args:
        sizes: length of each source's interval; their sum is the number of points of the rotation.
        seed: of the phase.
    """

    def __init__(self, sizes: Sequence[int], seed: int):
        self.ends = list(accumulate(sizes))
        self.size = self.ends[-1]
        self.step = _coprime_near(self.size, (5**0.5 - 1) / 2)
        self.phase = random.Random(f"hybridlm-mixture-{seed}").randrange(self.size)

    def source(self, place: int) -> int:
        """The source that place number `place` reads."""
        return bisect_right(self.ends, (self.phase + place * self.step) % self.size)

    def count_before(self, place: int, source: int) -> int:
        """Count the places before `place` that read `source`."""
        start = self.ends[source - 1] if source else 0
        above_start, above_end = (floor_sum(place, self.size, self.step, self.phase + self.size - border)
                                  for border in (start, self.ends[source]))
        return above_start - above_end


def _coprime_near(size: int, fraction: float) -> int:
    """The number nearest to fraction * size, from there upwards, that has no divisor in common with size."""
    step = max(1, int(size * fraction))
    while gcd(step, size) != 1:
        step += 1
    return step


class SampleOrder:
    """The order of samples over several sources, mixed by weight.

    Args:
        windows: windows of each source, at least one.
        weights: weight of each source.
        seed: of the order.
        shuffle: False keeps the windows of a source, and the sources in a block, in their own order.
        whole_blocks: every block holds the same samples of every source, weights rounded to that; the order of runs
            that an earlier version began.

    >>> order = SampleOrder([4, 2], weights=[2, 1], seed=0, shuffle=False)
    >>> [tuple(order.place(index)) for index in range(4)]
    [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 0, 2)]
    """

    def __init__(self, windows: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True,
                 whole_blocks: bool = False):
        if min(windows, default=0) < 1:
            raise ValueError(f"every source needs at least one window; got {list(windows)}")
        self.windows, self.seed, self.shuffle = list(windows), seed, shuffle
        self.counts = counts = block_counts(weights)
        period = sum(counts)
        self.block = period
        self.per_block, self.left_over = counts, 0
        self._rotation: _Rotation | None = None
        if period > MAX_BLOCK_SAMPLES:
            if whole_blocks:
                fractions = [weight / float(sum(weights)) for weight in weights]
                self.counts = self.per_block = _largest_remainders(fractions, MAX_BLOCK_SAMPLES)
                self.block = sum(self.counts)
            else:
                self.block = MAX_BLOCK_SAMPLES
                due = [divmod(count * self.block, period) for count in counts]
                self.per_block = [whole for whole, _ in due]
                self.left_over = self.block - sum(self.per_block)
                self._rotation = _Rotation([rest for _, rest in due], seed)
        self._ends = list(accumulate(self.per_block))
        self._make_caches()

    def _make_caches(self) -> None:
        self._permutation = lru_cache(maxsize=64)(Permutation)
        rotation = self._rotation
        self._count_before = lru_cache(maxsize=4096)(rotation.count_before if rotation else lambda place, source: 0)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_permutation", "_count_before")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._make_caches()

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
        source, read_before = self._source(block, slot)
        epoch, window = divmod(read_before, self.windows[source])
        if self.shuffle:
            window = self._permutation(self.windows[source], self.seed, "epoch", source, epoch)(window)
        return WindowPlace(source, epoch, window)

    def _source(self, block: int, slot: int) -> tuple[int, int]:
        """The source of slot `slot` of a block before shuffling, and how many samples of it come before this one."""
        source = bisect_right(self._ends, slot)
        if source < len(self._ends):
            count = self.per_block[source]
            read_before = block * count + slot - (self._ends[source] - count)
            return source, read_before + self._count_before(block * self.left_over, source)
        assert self._rotation is not None  # otherwise the sources fill the block
        place = block * self.left_over + slot - self._ends[-1]
        source = self._rotation.source(place)
        return source, (block + 1) * self.per_block[source] + self._rotation.count_before(place, source)

    def epochs(self, num_samples: int) -> list[float]:
        """Epochs of each source after `num_samples` samples, as the weights say."""
        total = sum(self.counts)
        return [num_samples * count / total / size for count, size in zip(self.counts, self.windows, strict=True)]
