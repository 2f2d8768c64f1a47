"""Lines that a sweep prints now and then: how far its running points are, and when it will end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlm.sweep.estimate import correct
from hybridlm.sweep.point import Point
from hybridlm.sweep.probe_tasks import read_probe_result
from hybridlm.training.display import format_duration

LOOK_INTERVAL_S = 1.0  # between looks at the metrics of the running points
MIN_INTERVAL_S = 30.0  # between lines of a short sweep
INTERVAL_FRACTION = 0.02  # of the estimated time, between lines of a long one
MIN_STEPS = 3  # of a start, before its pace counts
LAST_LINE_BYTES = 1 << 16  # read from the end of metrics.jsonl


@dataclass
class _Start:
    """A running point: when it started, at which step, and when it was first seen beyond that step."""

    time: float
    step: int
    first_seen: tuple[float, int] | None = None  # the start of the process lies before it, validation after it


class Progress:
    """Says where the running points are, and estimates again what is left of the sweep by their pace.

    Args:
        points: all points of the sweep.
        seconds: the estimate of each before the sweep ran.
        jobs: points at a time.
        say: gets a line now and then.
    """

    def __init__(self, points: Sequence[Point], seconds: Sequence[float], jobs: int, say: Callable[[str], None]):
        self.points = {point.name: point for point in points}
        self.guessed = list(seconds)
        self.jobs = jobs
        self.say = say
        self.took: dict[str, float] = {}  # seconds of the points that have finished in this call
        self._running: dict[str, _Start] = {}
        self._last_look = self._last_line = time.monotonic()

    def started(self, name: str) -> None:
        """Note that a point has started."""
        self._running[name] = _Start(time.monotonic(), steps_done(self.points[name]))

    def ended(self, name: str, *, finished: bool) -> None:
        """Note that a point has ended; one that has finished from its first step on says how wrong the estimate was."""
        start = self._running.pop(name, None)
        if start is not None and finished and start.step == 0:
            self.took[name] = time.monotonic() - start.time

    def tick(self, waiting: Sequence[str]) -> None:
        """Print a line per running point when it is time; `waiting` are the points that have not started."""
        now = time.monotonic()
        if now - self._last_look < LOOK_INTERVAL_S:
            return
        self._last_look = now
        for name, start in self._running.items():
            done = steps_done(self.points[name])
            if start.first_seen is None and done > start.step:
                start.first_seen = (now, done)
        if now - self._last_line < max(MIN_INTERVAL_S, INTERVAL_FRACTION * sum(self.guessed) / self.jobs):
            return
        self._last_line = now
        left = format_duration(self.seconds_left(waiting))
        for name in self._running:
            of_point = self.seconds_left_of(name)
            pace = "" if of_point is None else f", about {format_duration(of_point)} left"
            self.say(f"{name}: {describe_position(self.points[name])}{pace}; about {left} left of the sweep")

    def seconds_left(self, waiting: Sequence[str]) -> float:
        """Estimate the seconds until all points have finished."""
        now = time.monotonic()
        left_by_pace = {name: self.seconds_left_of(name) for name in self._running}
        known = dict(self.took)
        for name, left in left_by_pace.items():  # what a running point will have taken, where it has a pace
            if left is not None and self._running[name].step == 0:
                known[name] = now - self._running[name].time + left
        seconds = dict(zip(self.points, correct(list(self.points.values()), self.guessed, known), strict=True))
        rest = [seconds[name] for name in waiting]
        for name, left in left_by_pace.items():
            rest.append(max(0.0, seconds[name] - (now - self._running[name].time)) if left is None else left)
        return max(sum(rest) / self.jobs, max(rest, default=0.0))

    def seconds_left_of(self, name: str) -> float | None:
        """Seconds that a running point has left to train on text by its own pace; None before it has one."""
        point, start = self.points[name], self._running[name]
        done = steps_done(point)
        if not point.steps or point.work.probes or start.first_seen is None:
            return None
        since, first = start.first_seen
        if done >= point.steps:
            return 0.0
        if done - first < MIN_STEPS:
            return None
        return (point.steps - done) * (time.monotonic() - since) / (done - first)


def steps_done(point: Point) -> int:
    """The last step that a point's metrics.jsonl holds; 0 before the first."""
    record = _last_record(Path(point.config.run_dir) / "metrics.jsonl")
    return record.get("step", 0)


def describe_position(point: Point) -> str:
    """Describe where a point is: its step, or the probe that it is trained on."""
    done = steps_done(point)
    probes = point.work.probes
    if probes and done >= point.steps:
        results = sum(read_probe_result(Path(point.config.run_dir), task) is not None for task in probes)
        return f"probe {min(results + 1, len(probes))} of {len(probes)}"
    return f"step {done} of {point.steps}"


def _last_record(file: Path) -> dict[str, Any]:
    """The last complete line of a file of JSON lines; empty where there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - LAST_LINE_BYTES))
            lines = stream.read().split(b"\n")[:-1]
        record = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else {}
