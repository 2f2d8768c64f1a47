"""Runs points as processes of this machine, some at a time; a point that was stopped is resumed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hybridlm.sweep.folder import is_busy, points_to_start, prepare_point
from hybridlm.sweep.point import Point
from hybridlm.sweep.process import PointProcess, describe_outcome, finish_point, start_point
from hybridlm.sweep.progress import Progress
from hybridlm.sweep.stop_request import StopRequest

POLL_INTERVAL_S = 0.1  # between checks of the processes
MAX_BUSY_WAIT_S = 60.0  # wait for a process of another sweep that still saves a point


def run_points(points: list[Point], *, jobs: int, retry_failed: bool, say: Callable[[str], None],
               imports: Sequence[str] = (), progress: Progress | None = None) -> str | None:
    """Run the points that have not finished, `jobs` at a time.

    Outcomes are on the disk as soon as a point ends. A signal lets the running points save; a second Ctrl-C kills them.

    Args:
        points: all points of the sweep.
        jobs: points at a time.
        retry_failed: start failed points again.
        say: gets a line for every start and end.
        imports: files and modules that register kinds of the user's own.
        progress: prints now and then how far the running points are.

    Returns:
        The name of the signal that stopped the sweep, or None.
    """
    return _LocalRun(points, jobs, retry_failed, say, imports, progress).run()


class _LocalRun:
    """The state of `run_points`: which points wait, and which run."""

    def __init__(self, points: list[Point], jobs: int, retry_failed: bool, say: Callable[[str], None],
                 imports: Sequence[str], progress: Progress | None):
        self.jobs = jobs
        self.progress = progress
        self.say = say
        self.imports = imports
        self.waiting = points_to_start(points, retry_failed)
        self.running: list[PointProcess] = []
        self.labels = {point.name: f"[{index}/{len(points)}] {point.name}" for index, point in enumerate(points, 1)}
        self.busy_since: float | None = None
        self.signalled: set[int] = set()  # process ids

    def run(self) -> str | None:
        with StopRequest() as stop:
            try:
                while self.waiting or self.running:
                    self._finish_ended(stop)
                    if stop.signal_name and not self.running:
                        break
                    if stop.signal_name:
                        self._ask_to_save(stop)
                    elif self._start_next():
                        continue
                    elif self._waited_too_long():
                        break
                    if self.progress is not None:
                        self.progress.tick([point.name for point in self.waiting])
                    time.sleep(POLL_INTERVAL_S)
            finally:
                for point in self.running:
                    point.signal(signal.SIGKILL)
        return stop.signal_name

    def _finish_ended(self, stop: StopRequest) -> None:
        for ended in [point for point in self.running if point.process.poll() is not None]:
            self.running.remove(ended)
            outcome = finish_point(ended, asked_to_stop=stop.signal_name is not None)
            self.say(f"{self.labels[ended.folder.name]}: {describe_outcome(outcome)}")
            if self.progress is not None:
                self.progress.ended(ended.folder.name, finished=outcome["status"] == "finished")

    def _start_next(self) -> bool:
        """Start one point where there is room; False where none could be started."""
        if len(self.running) >= self.jobs:
            return False
        ready = next((point for point in self.waiting if not is_busy(Path(point.config.run_dir))), None)
        if ready is None:
            return False
        self.waiting.remove(ready)
        self.busy_since = None
        self.running.append(start_point(prepare_point(ready), jobs=self.jobs, imports=self.imports))
        self.say(f"{self.labels[ready.name]}: started")
        if self.progress is not None:
            self.progress.started(ready.name)
        return True

    def _waited_too_long(self) -> bool:
        """Whether other processes have run all remaining points for too long; prints each of them then."""
        if self.running or not self.waiting:
            return False
        self.busy_since = self.busy_since or time.monotonic()
        if time.monotonic() - self.busy_since <= MAX_BUSY_WAIT_S:
            return False
        for point in self.waiting:
            self.say(f"{self.labels[point.name]}: left out, another process is training there")
        return True

    def _ask_to_save(self, stop: StopRequest) -> None:
        """Send SIGTERM to each process once, or kill them where the user insists."""
        for point in self.running:
            if stop.kill_now:
                point.signal(signal.SIGKILL)
            elif point.process.pid not in self.signalled:
                self.signalled.add(point.process.pid)
                point.signal(signal.SIGTERM)
