"""Ends a process whose training step makes no progress, and prints where it is.

Each rank watches itself in a thread of its own. In a step all ranks wait for each other: ranks whose line names a
collective operation wait, and the rank whose line names another place is the one they wait for.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType

TIMEOUT_FRACTION = 0.9  # of the timeout of collective operations: the line comes before their own error does
EXIT_DELAY_S = 1.0  # in which the other ranks print their lines too


class Watchdog:
    """Ends the process with exit code 1 after `timeout` seconds without a `beat`, unless `pause` was called."""

    def __init__(self, rank: int, ranks: int, timeout: float):
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self.step = 0
        self.last: float | None = None
        self.thread: threading.Thread | None = None

    def beat(self, step: int | None = None) -> None:
        """Note that the step makes progress, or that a new one begins."""
        self.step = self.step if step is None else step
        self.last = time.monotonic()
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self.thread.start()

    def pause(self) -> None:
        """Stop watching until the next `beat`: the step is over."""
        self.last = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.timeout / 10))
            last = self.last
            if last is not None and time.monotonic() - last > TIMEOUT_FRACTION * self.timeout:
                print(f"rank {self.rank} of {self.ranks}: step {self.step} has stood still for "
                      f"{time.monotonic() - last:.0f} s (engine.timeout={self.timeout:g}), in {main_thread_position()}",
                      file=sys.stderr, flush=True)
                time.sleep(EXIT_DELAY_S)
                os._exit(1)


def main_thread_position() -> str:
    """Describe the innermost function of this package that the main thread is in, and the function it has called."""
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident]  # type: ignore[index]
    inner = frame
    while frame is not None and "hybridlm" not in frame.f_globals.get("__name__", ""):
        frame = frame.f_back
    found = dict.fromkeys(_describe(one) for one in (frame, inner) if one is not None)
    return ", at ".join(found)


def _describe(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name} (line {frame.f_lineno})"
