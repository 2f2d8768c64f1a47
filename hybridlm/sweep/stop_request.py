"""Turns SIGTERM, Ctrl-C and a closed terminal into a flag, so that the points of a sweep can save before it ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Context that records signals which ask the sweep to stop, so that they do not end the process.

    Points run in sessions of their own, so that no signal reaches them but those that the sweep sends.

    Attributes:
        signal_name: the signal that asked to stop; None so far.
        kill_now: Ctrl-C came a second time.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.kill_now = False
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._handlers_before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.kill_now = self.signal_name is not None and number == signal.SIGINT
        self.signal_name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
