"""Results of a ladder as numbers: one loss per architecture, rung and seed, and paired differences to the reference.

All architectures of a rung and seed read the same tokens in the same order and share first weights, so differences
between them have less noise than losses. Their intervals are Student's, with the spread of differences pooled over
rungs, because two or three seeds of one rung say next to nothing about it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Measurement:
    """One finished point of a ladder.

    Args:
        architecture: its name.
        rung: name of its size.
        seed: of data order and first weights.
        loss: bits per byte on held-out text.
        compute: FLOPs of its training.
        flops_per_token: of a training step.
        tokens_per_second: in training; None where it was not measured.
        scores: accuracy of probes, by name.
        decode_milliseconds_per_token: time of a decoded token; None where it was not measured.
    """

    architecture: str
    rung: str
    seed: int
    loss: float
    compute: float
    flops_per_token: float
    tokens_per_second: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    decode_milliseconds_per_token: float | None = None


@dataclass(frozen=True)
class Difference:
    """Mean paired difference to the reference at one rung, with its interval where there is one.

    Args:
        mean: loss of the architecture minus that of the reference; negative is better.
        values: the difference of every shared seed.
        half_width: of the interval around the mean; None where no rung has two seeds.
    """

    mean: float
    values: tuple[float, ...]
    half_width: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper end."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


class Results:
    """The measurements of a ladder, by rung in its order.

    Args:
        measurements: finished points; those without a finite loss are left out.
        rungs: names in order of size.
        reference: architecture that all others are compared with.
    """

    def __init__(self, measurements: Iterable[Measurement], rungs: Sequence[str], reference: str):
        self.measurements = [each for each in measurements if math.isfinite(each.loss) and each.loss > 0]
        present = {each.rung for each in self.measurements}
        self.rungs = [rung for rung in rungs if rung in present]
        self.reference = reference
        found = dict.fromkeys(each.architecture for each in self.measurements)
        self.architectures = list(found)

    def cell(self, architecture: str, rung: str) -> dict[int, Measurement]:
        """Measurements of an architecture at a rung, by seed."""
        return {each.seed: each for each in self.measurements
                if (each.architecture, each.rung) == (architecture, rung)}

    def mean_loss(self, architecture: str, rung: str) -> float | None:
        """Mean loss over seeds."""
        losses = [each.loss for each in self.cell(architecture, rung).values()]
        return statistics.fmean(losses) if losses else None

    def paired(self, architecture: str, rung: str) -> tuple[float, ...]:
        """Loss of the architecture minus that of the reference, for every seed that both have."""
        own, reference = self.cell(architecture, rung), self.cell(self.reference, rung)
        return tuple(own[seed].loss - reference[seed].loss for seed in sorted(own.keys() & reference.keys()))

    def differences(self, architecture: str, level: float) -> dict[str, Difference]:
        """Paired differences at every rung where the architecture and the reference share a seed.

        Args:
            architecture: not the reference.
            level: probability of the intervals.
        """
        values = {rung: self.paired(architecture, rung) for rung in self.rungs}
        return pool_differences({rung: found for rung, found in values.items() if found}, level)

    def speed(self, architecture: str, rung: str) -> float | None:
        """Median training tokens per second over seeds."""
        return _median(each.tokens_per_second for each in self.cell(architecture, rung).values())

    def decode_time(self, architecture: str, rung: str) -> float | None:
        """Median milliseconds per decoded token over seeds."""
        return _median(each.decode_milliseconds_per_token for each in self.cell(architecture, rung).values())


def _median(values: Iterable[float | None]) -> float | None:
    """Median of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def pool_differences(values: dict[str, tuple[float, ...]], level: float) -> dict[str, Difference]:
    """Means and intervals of paired differences, their spread pooled over rungs.

    Args:
        values: differences by rung, one per seed.
        level: probability of the intervals.

    >>> found = pool_differences({"r0": (-0.03, -0.01), "r1": (-0.04, -0.02)}, 0.95)
    >>> round(found["r0"].mean, 3), round(found["r0"].half_width, 4)  # spread 0.0141 with 2 degrees of freedom
    (-0.02, 0.043)
    """
    freedom = sum(len(each) - 1 for each in values.values())
    means = {rung: statistics.fmean(each) for rung, each in values.items()}
    squares = sum((value - means[rung]) ** 2 for rung, each in values.items() for value in each)
    found = {}
    for rung, each in values.items():
        half = None
        if freedom > 0:
            quantile = float(student_t.ppf(0.5 + level / 2, freedom))
            half = quantile * math.sqrt(squares / freedom / len(each))
        found[rung] = Difference(means[rung], each, half)
    return found
