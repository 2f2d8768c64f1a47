"""Points as processes: each a `hybridlm train` of its own, some at a time, started again where they stopped."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import hybridlm
import hybridlm_kernels
from hybridlm.sweep.folder import OUTCOME_FILE, OUTPUT_FILE, begin, is_busy, outcome, write_json
from hybridlm.sweep.plan import Point
from hybridlm.training.display import duration

PAUSE = 0.1  # seconds between looks at the processes
PATIENCE = 60.0  # seconds that a point may stay busy with a process that is not ours: one that is still saving
_PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]


@dataclass
class _Process:
    point: Point
    process: subprocess.Popen[bytes]
    stdout: IO[bytes]
    output: IO[bytes]
    output_start: int
    started: float = field(default_factory=time.monotonic)


def to_do(points: list[Point], retry_failed: bool) -> list[Point]:
    """Points that are to be started: not the finished ones, and the failed ones only when asked."""
    done = {"finished"} if retry_failed else {"finished", "failed"}
    return [point for point in points if outcome(point)["status"] not in done]


def run_points(points: list[Point], *, jobs: int, retry_failed: bool, say: Say) -> str | None:
    """Run what is left, `jobs` points at a time. Returns the name of the signal that stopped it, or None.

    Outcomes are on the disk as soon as a point ends. Stopping lets points save; a second Ctrl-C kills them.
    """
    waiting, running = to_do(points, retry_failed), list[_Process]()
    number = {point.name: f"[{index}/{len(points)}]" for index, point in enumerate(points, 1)}
    busy_since: float | None = None
    with _Stop() as stop:
        try:
            while waiting or running:
                for ended in [each for each in running if each.process.poll() is not None]:
                    running.remove(ended)
                    result = _finish(ended, asked_to_stop=stop.requested is not None)
                    say(f"{number[ended.point.name]} {ended.point.name}: {describe(result)}")
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
                    running.append(_start(ready, jobs))
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
                _signal(each.process, signal.SIGKILL)
    return stop.requested


def describe(result: dict[str, Any]) -> str:
    """An outcome in words."""
    took = f" after {duration(result['seconds'])}" if "seconds" in result else ""
    if result["status"] == "failed":
        return f"failed{took}: {result['reason']}"
    if result["status"] == "interrupted":
        return "stopped" + (f" at step {result['step']}" if result["step"] else "") + took
    loss = (result.get("validation") or {}).get("validation_loss")
    return result["status"] + took + (f", validation loss {loss:.4f}" if isinstance(loss, float) else "")


def _start(point: Point, jobs: int) -> _Process:
    file = begin(point)
    words = _command(file)
    output = (file.parent / OUTPUT_FILE).open("ab")
    output.write(f"$ {shlex.join(words)}\n".encode())
    output.flush()
    stdout = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stdout, stderr=output, env=_environment(jobs),
                               start_new_session=True, preexec_fn=_die_with_parent())
    return _Process(point, process, stdout, output, output.tell())


def _command(file: Path) -> list[str]:
    return [sys.executable, "-m", "hybridlm.cli", "train", str(file), "--json"]


def _environment(jobs: int) -> dict[str, str]:
    """That of this process; the same packages are found, and several points share the cores."""
    packages = [Path(package.__file__ or "").resolve().parents[1] for package in (hybridlm, hybridlm_kernels)]
    ours = [str(path) for path in packages if path.name not in ("site-packages", "dist-packages")]
    before = os.environ.get("PYTHONPATH", "")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*ours, *([before] if before else [])])}
    if jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return env


def _die_with_parent() -> Callable[[], None] | None:
    """Where the system can, a point is asked to save and leave when the sweep itself is killed."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _finish(ended: _Process, *, asked_to_stop: bool) -> dict[str, Any]:
    """Reads how a point ended, and writes it down."""
    seconds = time.monotonic() - ended.started
    ended.stdout.seek(0)
    printed = ended.stdout.read().decode("utf-8", "replace").strip().splitlines()
    ended.stdout.close()
    ended.output.close()
    result: dict[str, Any] = {"status": "failed", "seconds": seconds}
    try:
        if ended.process.returncode == 0:
            told = json.loads(printed[-1])
            result |= {key: told[key] for key in ("status", "step", "validation", "bigram_bits_per_byte", "checkpoint")}
    except (IndexError, ValueError, KeyError):
        pass
    if result["status"] == "failed" and asked_to_stop and ended.process.returncode < 0:
        result |= {"status": "interrupted", "step": None}  # before it could listen, or the second time
    if result["status"] == "failed":
        folder = Path(ended.point.config.run_dir)
        result["reason"] = _reason(ended.process.returncode, folder / OUTPUT_FILE, ended.output_start)
    write_json(Path(ended.point.config.run_dir) / OUTCOME_FILE, result)
    return result


def _reason(code: int, output: Path, start: int) -> str:
    """The error a point printed, or its last line; a signal by its name."""
    with output.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines or [f"exit code {code}, nothing was printed"])[-1]


class _Stop:
    """SIGTERM, Ctrl-C and a terminal that closes, as a flag; points stand in sessions of their own and hear of it
    from here."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._told: set[int] = set()
        self._hard = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
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
        self._hard = self.requested is not None and number == signal.SIGINT
        self.requested = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def tell(self, running: list[_Process]) -> None:
        """Ask each process once; after a second Ctrl-C end them."""
        for each in running:
            if self._hard:
                _signal(each.process, signal.SIGKILL)
            elif each.process.pid not in self._told:
                self._told.add(each.process.pid)
                _signal(each.process, signal.SIGTERM)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the whole session of a point, its data workers included."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
