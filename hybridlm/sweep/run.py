"""Points as processes of this machine, some at a time, started again where they stopped."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hybridlm.sweep.folder import begin, is_busy, outcome
from hybridlm.sweep.plan import Point
from hybridlm.sweep.process import PointProcess, describe, finish, start

PAUSE = 0.1  # seconds between looks at the processes
PATIENCE = 60.0  # seconds that a point may stay busy with a process that is not ours: one that is still saving

Say = Callable[[str], None]


def to_do(points: list[Point], retry_failed: bool) -> list[Point]:
    """Points that are to be started: not the finished ones, and the failed ones only when asked."""
    done = {"finished"} if retry_failed else {"finished", "failed"}
    return [point for point in points if outcome(point)["status"] not in done]


def run_points(points: list[Point], *, jobs: int, retry_failed: bool, say: Say) -> str | None:
    """Run what is left, `jobs` points at a time. Returns the name of the signal that stopped it, or None.

    Outcomes are on the disk as soon as a point ends. Stopping lets points save; a second Ctrl-C kills them.
    """
    waiting, running = to_do(points, retry_failed), list[PointProcess]()
    number = {point.name: f"[{index}/{len(points)}]" for index, point in enumerate(points, 1)}
    busy_since: float | None = None
    with Stop() as stop:
        try:
            while waiting or running:
                for ended in [each for each in running if each.process.poll() is not None]:
                    running.remove(ended)
                    result = finish(ended, asked_to_stop=stop.requested is not None)
                    say(f"{number[ended.folder.name]} {ended.folder.name}: {describe(result)}")
                if stop.requested:
                    if not running:
                        break
                    stop.tell(running)
                    time.sleep(PAUSE)
                    continue
                ready = next((point for point in waiting if not is_busy(Path(point.config.run_dir))), None)
                if ready is not None and len(running) < jobs:
                    waiting.remove(ready)
                    busy_since = None
                    running.append(start(begin(ready), jobs=jobs))
                    say(f"{number[ready.name]} {ready.name}: started")
                    continue
                if ready is None and waiting and not running:
                    busy_since = busy_since or time.monotonic()
                    if time.monotonic() - busy_since > PATIENCE:
                        for point in waiting:
                            say(f"{number[point.name]} {point.name}: left out, another process is training there")
                        break
                time.sleep(PAUSE)
        finally:
            for each in running:
                each.signal(signal.SIGKILL)
    return stop.requested


class Stop:
    """SIGTERM, Ctrl-C and a terminal that closes, as a flag; points stand in sessions of their own and hear of it
    from here."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._told: set[int] = set()
        self.hard = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _numbers(self) -> Iterator[int]:
        yield from (signal.SIGTERM, signal.SIGINT)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
            yield signal.SIGHUP

    def _handle(self, number: int, frame: object) -> None:
        self.hard = self.requested is not None and number == signal.SIGINT
        self.requested = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def tell(self, running: list[PointProcess]) -> None:
        """Ask each process once; after a second Ctrl-C end them."""
        for each in running:
            if self.hard:
                each.signal(signal.SIGKILL)
            elif each.process.pid not in self._told:
                self._told.add(each.process.pid)
                each.signal(signal.SIGTERM)
