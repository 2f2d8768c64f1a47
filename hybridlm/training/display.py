"""Display of a run: a progress bar on a terminal, plain lines elsewhere, and the text of both in log.txt."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

log = logging.getLogger("hybridlm")


class Display:
    """Prints through the logger `hybridlm`, so that all warnings appear in the same places.

    `to_stderr` leaves standard output to a machine-readable result; `silent` (all ranks but the first) shows nothing.
    """

    def __init__(self, log_file: Path | None, *, log_every: int = 10, to_stderr: bool = False, silent: bool = False):
        self.console = _Console(file=sys.stderr if to_stderr else sys.stdout, highlight=False, soft_wrap=True)
        self.log_every = log_every
        self.console.quiet = silent
        self.handlers: list[logging.Handler] = [_ConsoleHandler(self)]
        if log_file is not None and not silent:
            self.handlers.append(_FileHandler(log_file, encoding="utf-8"))
            self.handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.pace = Pace()
        self.total = 0
        self._last_line = 0

    def __enter__(self) -> Display:
        self._level = log.level
        log.setLevel(logging.INFO)
        for handler in self.handlers:
            log.addHandler(handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()
        for handler in self.handlers:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(self._level)

    def begin(self, done: int, total: int) -> None:
        """Begin to show steps, of which `done` of `total` were made before."""
        self.total = total
        self._last_line = done
        if self.console.is_terminal and not self.console.quiet:
            steps = Column(no_wrap=True, min_width=len(f"{total}/{total}"))  # a long text is cut, not the steps
            self.bar = Progress(TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=steps),
                                BarColumn(bar_width=None),
                                TextColumn("{task.fields[text]}",
                                           table_column=Column(no_wrap=True, overflow="ellipsis")),
                                console=self.console, expand=True)
            self.task = self.bar.add_task("", total=total, completed=done, text="")
            self.bar.start()

    def step(self, record: dict[str, Any], *, final: bool = False) -> None:
        """Show one step's record."""
        step = record["step"]
        self.pace.tick()
        left = self.pace.seconds_per_step() * (self.total - step)
        text = format_record(record, f"{format_duration(left)} left")
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, text=text)
        if final or step - self._last_line >= self.log_every:
            self._last_line = step
            log.info("step %d/%d  %s", step, self.total, text, extra={"quiet": self.bar is not None})

    def stop(self) -> None:
        """End the bar; later text is printed below it."""
        if self.bar is not None:
            bar, self.bar = self.bar, None
            try:
                bar.stop()
            except OSError:
                self.console.on_broken_pipe()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Stop printing when the reader of the output has closed (a pipe, a terminal); log.txt has everything."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class _ConsoleHandler(logging.Handler):
    def __init__(self, display: Display):
        super().__init__()
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "quiet", False):
            return
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        try:
            self.display.console.print(mark + record.getMessage(), markup=False, style="yellow" if mark else "")
        except OSError:
            self.display.console.on_broken_pipe()


class _FileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a full disk: lines of the log are lost, the run continues."""


class Pace:
    """Smoothed seconds per step; the time between steps (validation, saving) counts too.

    The first step counts only until there is a second one, because it includes warming up.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._ticks = 0
        self._mean = 0.0

    def tick(self) -> None:
        """Count a step that ends now."""
        now = time.perf_counter()
        took = now - self._last
        self._last = now
        self._ticks += 1
        self._mean = took if self._ticks <= 2 else 0.95 * self._mean + 0.05 * took

    def seconds_per_step(self) -> float:
        """Return the smoothed mean."""
        return self._mean


def format_record(record: dict[str, Any], left: str = "") -> str:
    """Format the numbers of a record that a person watches, those that a narrow terminal must show first.

    Args:
        record: of one step.
        left: the time that is left, as text.
    """
    if record.get("skipped"):
        return "  ".join(filter(None, ["not finite: step skipped", left]))
    shown = "total_loss" if record["loss"] is None else "loss"  # a stage may not compute that of the next token
    parts = [f"loss {record[shown]:.4f}"]
    if record.get("bits_per_byte") is not None:
        parts.append(f"{record['bits_per_byte']:.3f} bits/byte")
    parts += [f"{format_count(record['tokens_per_second'])} tokens/s", left]
    for name, form in _WATCHED.items():
        if record.get(name) is not None:
            parts.append(form.format(record[name]))
    if record.get("moe/dead_experts"):
        parts.append(f"{record['moe/dead_experts']:.0f} dead experts")
    return "  ".join(filter(None, parts))


# What a line shows of a record beside loss and speed, where the record has it, in this order.
_WATCHED = {"lr": "lr {:.2e}", "grad_norm": "gradient norm {:.3g}", "epochs": "epoch {:.2f}",
            "moe/max_violation_worst": "worst violation {:.2f}", "loss/indexer_kl": "indexer KL {:.4f}",
            "dsa/indexer_recall": "recall {:.3f}", "validation_loss": "validation {:.4f}"}


def format_count(number: float) -> str:
    """Format a large number with three digits and a letter.

    Example:
        >>> format_count(1234567)
        '1.23M'
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Format seconds as h:mm:ss, with days where there are any.

    Example:
        >>> format_duration(90061)
        '1d 1:01:01'
    """
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{secs:02d}"
