"""SIGTERM, Ctrl-C and a terminal that closes: finish the step, save, leave with 0. A second Ctrl-C leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType

SIGNALS = ("SIGTERM", "SIGHUP", "Ctrl-C")  # what `StopSignal.requested` may be


class StoppedBeforeTraining(KeyboardInterrupt):
    """Raised when a signal asks the run to stop before its first step, when there is nothing to save."""


class StopSignal:
    """Turns signals into a flag the loop reads between steps. Works in the main thread; in others it does nothing.

    Until `enter_loop()` a signal raises StoppedBeforeTraining, so that a long preparation ends too.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._in_loop = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def enter_loop(self) -> None:
        """Switch to the flag: later signals set `requested` instead of raising."""
        self._in_loop = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self._in_loop:
            raise StoppedBeforeTraining(name)
        if self.requested and number == signal.SIGINT:
            os._exit(1)
        self.requested = name
        with contextlib.suppress(OSError):  # straight to the terminal: a handler must not wait for anybody's lock
            os.write(2, f"\n{name}: finishing this step, then saving. Ctrl-C again leaves at once.\n".encode())
