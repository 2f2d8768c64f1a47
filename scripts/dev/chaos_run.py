"""One run of `hybridlm train` for chaos.py: its folder, its processes and its output.

Launcher and ranks are forks of this process, which has imported what they need: the command and its launcher are the
ordinary ones, but a rank starts in a second of CPU time instead of five.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import accelerate  # noqa: F401
import torch._dynamo  # noqa: F401  (the optimizers import it on their first step)

from hybridlm.cli import main as hybridlm
from hybridlm.distributed import launch
from hybridlm.training import run as _run  # noqa: F401

WAIT_LIMIT_S = 600.0  # for anything to happen
POLL_INTERVAL_S = 0.02
PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)


class Broken(Exception):
    """The run did what no fault may lead to."""


class Forked:
    """The part of subprocess.Popen that the launcher uses, by fork alone."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, start_new_session: bool = True,
                 preexec_fn: Callable[[], None] | None = None, output: Path | None = None):
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if preexec_fn is not None:
                preexec_fn()
            if env is not None:
                os.environ.update(env)
            if output is not None:
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(file, 1)
                os.dup2(file, 2)
            launch.subprocess = SimpleNamespace(Popen=Forked)  # type: ignore[assignment]
            code = hybridlm(command[command.index("train"):])
            sys.stdout.flush()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Run:
    """A run in `folder`; its checkpoints lie on `disk` if given."""

    def __init__(self, folder: Path, words: list[str], disk: Path | None = None):
        self.folder, self.checkpoints, self.disk = folder, folder / "checkpoints", disk
        self.out = folder.with_suffix(".txt")
        self.words = ["train", *words, f"run_dir={folder}", "--restarts", "1000"]
        self.launcher: Forked | None = None
        self.marked = 0
        folder.mkdir(parents=True)
        if disk is not None:
            self.checkpoints.symlink_to(disk)

    def start(self) -> None:
        self.launcher = Forked(self.words, output=self.out)

    def ended(self) -> bool:
        return self.launcher is None or self.launcher.poll() is not None

    def ranks(self) -> list[int]:
        return children(self.launcher.pid) if self.launcher is not None else []

    def pids(self) -> list[int]:
        return [*self.ranks(), *([] if self.ended() else [self.launcher.pid])]  # type: ignore[union-attr]

    def step(self) -> int:
        """Return the last step on record."""
        return max(records(self.folder / "metrics.jsonl"), default=0)

    def mark(self) -> None:
        """Let `output_since_mark` begin here."""
        self.marked = self.out.stat().st_size if self.out.exists() else 0

    def output_since_mark(self) -> str:
        """Return the output after the mark."""
        return self.printed()[self.marked:].decode(errors="replace")

    def printed(self) -> bytes:
        return self.out.read_bytes() if self.out.exists() else b""

    def broken(self, what: str) -> Broken:
        return Broken(f"{what}:\n{self.printed()[-2000:].decode(errors='replace')}")

    def wait(self, what: str, condition: Callable[[], bool], restart: bool = False) -> None:
        """Wait until `condition` holds. With `restart` the command is given again when it has ended well."""
        limit = time.monotonic() + WAIT_LIMIT_S
        while not condition():
            if self.ended():
                code = None if self.launcher is None else self.launcher.returncode
                if not restart or code not in (None, 0, -signal.SIGKILL):
                    raise self.broken(f"the run ended (exit code {code}) before {what}")
                self.start()
            if time.monotonic() > limit:
                raise self.broken(f"waited {WAIT_LIMIT_S:.0f} s for {what}")
            time.sleep(POLL_INTERVAL_S)

    def wait_until_gone(self, pids: list[int]) -> float:
        """Wait until none of the processes lives; returns the seconds it took."""
        begin = time.monotonic()
        while any(alive(pid) for pid in pids):
            if time.monotonic() - begin > WAIT_LIMIT_S:
                raise self.broken(f"processes {pids} live on")
            time.sleep(POLL_INTERVAL_S)
        return time.monotonic() - begin

    def resumed(self) -> int | None:
        """Return the step of the checkpoint that the last session after the mark began from, once its first step has
        begun."""
        *_, last = self.output_since_mark().rpartition("going on from ")
        found = re.match(r"\S*step-(\d+)\n", last)
        return int(found[1]) if found and "\nkernels: " in last else None


def adopt_orphans() -> None:
    """Make this process the parent of orphans: a descendant that loses its parent is then among its `children`."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def children(parent: int) -> list[int]:
    """List the living children of a process, oldest first."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return sorted(pid for pid in pids if _state(pid)[1:2] == [str(parent)] and alive(pid))


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    return _state(pid)[:1] not in ([], ["Z"], ["X"])


def _state(pid: int) -> list[str]:
    """Read state and parent of a process from /proc; empty without such a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def records(file: Path) -> dict[int, dict]:
    """Read the complete lines of a file by step; a step that stands there twice is an error."""
    rows = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in rows if line.endswith(b"\n")]
    if len({row["step"] for row in found}) != len(found):
        raise Broken(f"{file} has a step twice")
    return {row["step"]: row for row in found}
