"""Verdicts: whether an architecture passes the gate against the reference, fails it, or cannot be judged.

  loss        the paired difference is below 0 at every gate rung, with an interval that excludes 0
  speed-up    the effective speed-up (compute gain times achieved FLOP/s) is above 1 at every gate rung
  projection  the fitted law is below that of the reference at every compute that is asked for
  probes      no probe is worse than that of the reference by more than its interval

One failure fails the gate; without one, whatever the data cannot decide leaves it undecided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hybridlm.ladder.bootstrap import Bootstrap, Interval
from hybridlm.ladder.law import Fit, gain_of_losses
from hybridlm.ladder.measurements import Difference, Results, pool_differences

Status = Literal["passes", "fails", "undecided"]


@dataclass(frozen=True)
class Criterion:
    """One condition of the gate, how it ended, and why."""

    name: str
    status: Status
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The end of the gate for one architecture."""

    architecture: str
    status: Status
    reason: str
    criteria: tuple[Criterion, ...]


@dataclass(frozen=True)
class Comparison:
    """An architecture beside the reference at one rung.

    Args:
        rung: name of the size.
        difference: of losses, paired by seed.
        gain: compute-equivalent gain, and its interval from that of the difference.
        speed_ratio: achieved FLOP/s over those of the reference in the same ladder; None where it was not measured.
    """

    rung: str
    difference: Difference
    gain: float
    gain_interval: Interval | None
    speed_ratio: float | None

    @property
    def speed_up(self) -> float | None:
        """Effective speed-up: time to the architecture's loss with the reference, over that with the architecture."""
        return None if self.speed_ratio is None else self.gain * self.speed_ratio

    @property
    def speed_up_interval(self) -> Interval | None:
        """Interval of the speed-up, as far as it comes from losses; speeds count as exact."""
        if self.speed_ratio is None or self.gain_interval is None:
            return None
        return self.gain_interval[0] * self.speed_ratio, self.gain_interval[1] * self.speed_ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain data; infinite gains are null."""
        interval = self.speed_up_interval
        return {"rung": self.rung, "difference": self.difference.mean, "differences": list(self.difference.values),
                "difference_interval": _finite(self.difference.interval), "gain": _finite_number(self.gain),
                "gain_interval": _finite(self.gain_interval), "speed_ratio": self.speed_ratio,
                "speed_up": None if self.speed_up is None else _finite_number(self.speed_up),
                "speed_up_interval": _finite(interval)}


def _finite_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [_finite_number(value) for value in interval]


def compare(results: Results, fit: Fit, architecture: str, level: float) -> list[Comparison]:
    """Compare an architecture with the reference at every rung that both have.

    Args:
        results: the measurements.
        fit: the laws; the reference's says what a difference of losses is worth.
        architecture: not the reference.
        level: probability of the intervals.
    """
    law = fit.laws[results.reference]
    found = []
    for rung, difference in results.differences(architecture, level).items():
        own, reference = results.cell(architecture, rung), results.cell(results.reference, rung)
        shared = sorted(own.keys() & reference.keys())
        base_loss = statistics.fmean(reference[seed].loss for seed in shared)
        ratio = reference[shared[0]].compute / own[shared[0]].compute

        def gain(change: float, base_loss: float = base_loss, ratio: float = ratio) -> float:
            return gain_of_losses(base_loss, base_loss + change, law.asymptote, law.exponent, ratio)

        interval = difference.interval
        found.append(Comparison(rung, difference, gain(difference.mean),
                                None if interval is None else (gain(interval[1]), gain(interval[0])),
                                _speed_ratio(results, architecture, rung)))
    return found


def _speed_ratio(results: Results, architecture: str, rung: str) -> float | None:
    """FLOP/s of the architecture over those of the reference: what equal FLOPs cost in time."""
    own, reference = results.speed(architecture, rung), results.speed(results.reference, rung)
    if not own or not reference:
        return None
    flops = [next(iter(results.cell(name, rung).values())).flops_per_token
             for name in (architecture, results.reference)]
    return flops[0] * own / (flops[1] * reference)


@dataclass(frozen=True)
class Projection:
    """Fitted losses of an architecture and the reference at one compute, and the interval of their difference."""

    compute: float
    loss: float
    reference_loss: float
    interval: Interval | None

    @property
    def difference(self) -> float:
        """Loss of the architecture minus that of the reference."""
        return self.loss - self.reference_loss


def project(results: Results, fit: Fit, draws: Bootstrap, architecture: str, computes: Sequence[float],
            level: float) -> list[Projection]:
    """Project both laws to amounts of compute, with the interval of their difference over the bootstrap.

    Args:
        results: names the reference.
        fit: the laws.
        draws: fits to redrawn losses.
        architecture: not the reference.
        computes: FLOPs.
        level: probability of the intervals.
    """

    def difference(each: Fit, compute: float) -> float:
        return each.laws[architecture].loss(compute) - each.laws[results.reference].loss(compute)

    return [Projection(compute, fit.laws[architecture].loss(compute), fit.laws[results.reference].loss(compute),
                       draws.interval(lambda each, compute=compute: difference(each, compute), level))  # type: ignore[misc]
            for compute in computes]


def judge(results: Results, architecture: str, comparisons: Sequence[Comparison], projections: Sequence[Projection],
          gate_rungs: Sequence[str], level: float) -> Verdict:
    """Judge an architecture.

    Args:
        results: the measurements, with scores of probes.
        architecture: not the reference.
        comparisons: of `compare`.
        projections: of `project`; none leaves this condition out.
        gate_rungs: rungs that count.
        level: probability of the intervals.
    """
    criteria = [_judge_loss(comparisons, gate_rungs), _judge_speed(comparisons, gate_rungs)]
    if projections:
        criteria.append(_judge_projections(projections))
    criteria += _judge_probes(results, architecture, level)
    for status in ("fails", "undecided"):
        if decisive := [each for each in criteria if each.status == status]:
            reason = "; ".join(f"{each.name}: {each.reason}" for each in decisive)
            return Verdict(architecture, status, reason, tuple(criteria))  # type: ignore[arg-type]
    return Verdict(architecture, "passes", "; ".join(f"{each.name}: {each.reason}" for each in criteria),
                   tuple(criteria))


def _judge_loss(comparisons: Sequence[Comparison], gate_rungs: Sequence[str]) -> Criterion:
    found = {each.rung: each.difference for each in comparisons}
    return _combine("loss", [_side(rung, found[rung].mean if rung in found else None,
                                   found[rung].interval if rung in found else None, 0.0, "{:+.4f}",
                                   lower_is_better=True) for rung in gate_rungs])


def _judge_speed(comparisons: Sequence[Comparison], gate_rungs: Sequence[str]) -> Criterion:
    found = {each.rung: each for each in comparisons}
    return _combine("speed-up", [_side(rung, found[rung].speed_up if rung in found else None,
                                       found[rung].speed_up_interval if rung in found else None, 1.0, "{:.3g}x",
                                       lower_is_better=False) for rung in gate_rungs])


def _judge_projections(projections: Sequence[Projection]) -> Criterion:
    return _combine("projection", [_side(f"{each.compute:.3g} FLOPs", each.difference, each.interval, 0.0, "{:+.4f}",
                                         lower_is_better=True) for each in projections])


def _side(place: str, value: float | None, interval: Interval | None, neutral: float, form: str, *,
          lower_is_better: bool) -> Criterion:
    """Whether an interval lies on the better side of the neutral value, on the worse one, or on both."""
    if value is None:
        return Criterion("", "undecided", f"not measured at {place}")
    if interval is None:
        return Criterion("", "undecided", f"{form.format(value)} at {place} without an interval: one seed")
    low, high = interval
    said = f"{form.format(value)} ({form.format(low)} to {form.format(high)}) at {place}"
    better, worse = (high < neutral, low > neutral) if lower_is_better else (low > neutral, high < neutral)
    return Criterion("", "passes" if better else "fails" if worse else "undecided", said)


def _combine(name: str, places: Sequence[Criterion]) -> Criterion:
    """One condition out of what it says at several places: those decide that have the worst status."""
    for status in ("fails", "undecided", "passes"):
        if chosen := [each for each in places if each.status == status]:
            return Criterion(name, status, ", ".join(each.reason for each in chosen))  # type: ignore[arg-type]
    return Criterion(name, "undecided", "there is no rung to judge by")


def _judge_probes(results: Results, architecture: str, level: float) -> list[Criterion]:
    """One condition per probe, at the largest rung with scores of both."""
    found: list[Criterion] = []
    for rung in reversed(results.rungs):
        own, reference = results.cell(architecture, rung), results.cell(results.reference, rung)
        shared = sorted(own.keys() & reference.keys())
        for name in sorted({name for seed in shared for name in own[seed].scores}):
            if any(each.name == name for each in found):
                continue
            values = tuple(own[seed].scores[name] - reference[seed].scores[name] for seed in shared
                           if name in own[seed].scores and name in reference[seed].scores)
            if values:
                found.append(_judge_probe(name, rung, pool_differences({rung: values}, level)[rung]))
    return found


def _judge_probe(name: str, rung: str, difference: Difference) -> Criterion:
    """A probe fails where it is worse by more than its interval; all values are said, as scores have two humps."""
    each = ", ".join(f"{value:+.2f}" for value in difference.values)
    interval = difference.interval
    if interval is None:
        status: Status = "undecided" if difference.mean < 0 else "passes"
        return Criterion(name, status, f"accuracy {each} at {rung}, one seed")
    return Criterion(name, "fails" if interval[1] < 0 else "passes", f"accuracy {each} at {rung}")
