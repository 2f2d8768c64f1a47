"""Ends a process whose training step stands still, and says where it stands.

Each rank watches itself in a thread of its own, for a step is one in which all wait for all: of the lines that the
ranks print, those in a collective operation wait, and the other one is what they wait for.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType

SHARE = 0.9  # of the timeout of collective operations: the line comes before their own error does
LINGER = 1.0  # seconds in which the others say their lines too


class Watchdog:
    """`timeout`: seconds without a `beat` between `beat` and `rest` after which the process ends with exit code 1."""

    def __init__(self, rank: int, ranks: int, timeout: float):
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self.step = 0
        self.last: float | None = None
        self.thread: threading.Thread | None = None

    def beat(self, step: int | None = None) -> None:
        """The step goes on, or a new one begins."""
        self.step = self.step if step is None else step
        self.last = time.monotonic()
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self.thread.start()

    def rest(self) -> None:
        """The step is over."""
        self.last = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.timeout / 10))
            last = self.last
            if last is not None and time.monotonic() - last > SHARE * self.timeout:
                print(f"rank {self.rank} of {self.ranks}: step {self.step} has stood still for "
                      f"{time.monotonic() - last:.0f} s (engine.timeout={self.timeout:g}), in {where()}",
                      file=sys.stderr, flush=True)
                time.sleep(LINGER)
                os._exit(1)


def where() -> str:
    """The place in this package that the main thread has come to, and what it called."""
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident]  # type: ignore[index]
    inner = frame
    while frame is not None and "hybridlm" not in frame.f_globals.get("__name__", ""):
        frame = frame.f_back
    found = dict.fromkeys(_place(one) for one in (frame, inner) if one is not None)
    return ", at ".join(found)


def _place(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name} (line {frame.f_lineno})"
