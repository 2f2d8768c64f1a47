"""Starts the process of one point in a process group of its own, and reads its outcome."""

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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import hybridlm
import hybridlm_kernels
from hybridlm.config.serialization import load_yaml, to_dict
from hybridlm.files import write_json
from hybridlm.sweep.folder import OUTCOME_FILE, OUTPUT_FILE, POINT_FILE
from hybridlm.sweep.probe_tasks import WORK_FILE, PointWork
from hybridlm.training.display import format_duration
from hybridlm.training.guards import TrainingDiverged

PR_SET_PDEATHSIG = 1  # of Linux' prctl
RESULT_KEYS = ("status", "step", "validation", "bigram_bits_per_byte", "checkpoint")  # that `train --json` prints


@dataclass
class PointProcess:
    """The running process of a point.

    Attributes:
        folder: the run folder of the point.
        process: the process, in a session of its own.
        stdout: what the process prints on standard output; its last line is JSON.
        output: output.txt, which gets its standard error.
        output_start: where in output.txt this start begins.
        started: the time of the start, in seconds of the monotonic clock.
    """

    folder: Path
    process: subprocess.Popen[bytes]
    stdout: IO[bytes]
    output: IO[bytes]
    output_start: int
    started: float = field(default_factory=time.monotonic)

    def signal(self, number: int) -> None:
        """Send a signal to the whole session of the point, its data workers included."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def start_point(folder: Path, *, jobs: int = 1, cwd: str | None = None,
                imports: Sequence[str] = ()) -> PointProcess:
    """Start the process of the point whose config is in `folder`.

    Args:
        folder: the run folder of the point.
        jobs: how many points share the cores of this machine.
        cwd: the folder that relative paths in the config start at; None: that of this process.
        imports: files and modules that register kinds of the user's own, see `hybridlm.user_code`.
    """
    words = point_command(folder / POINT_FILE, imports)
    output = (folder / OUTPUT_FILE).open("ab")
    output.write(f"$ {shlex.join(words)}\n".encode())
    output.flush()
    stdout = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stdout, stderr=output,
                               env=child_environment(jobs), cwd=cwd, start_new_session=True,
                               preexec_fn=prepare_child(signal.SIGTERM))
    return PointProcess(folder, process, stdout, output, output.tell())


def point_command(file: Path, imports: Sequence[str] = ()) -> list[str]:
    """Build the command of the point whose config is `file`: `hybridlm train` for one without other work."""
    arguments = [word for name in imports for word in ("--import", name)]
    # Compared as plain data: the kinds of the user's probes need not be known to this process.
    if load_yaml(file.parent / WORK_FILE) != to_dict(PointWork()):
        return [sys.executable, "-m", "hybridlm.sweep.run_point", str(file.parent), *arguments]
    return [sys.executable, "-m", "hybridlm.cli", "train", str(file), "--json", *arguments]


def child_environment(jobs: int) -> dict[str, str]:
    """Build the environment of a child: it finds the same packages, and `jobs` children divide the cores."""
    folders = [Path(package.__file__ or "").resolve().parents[1] for package in (hybridlm, hybridlm_kernels)]
    search_path = [str(folder) for folder in folders if folder.name not in ("site-packages", "dist-packages")]
    if os.environ.get("PYTHONPATH"):
        search_path.append(os.environ["PYTHONPATH"])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    if jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return env


def prepare_child(when_orphaned: int) -> Callable[[], None] | None:
    """Make the function that a new child runs, so that it gets the signal `when_orphaned` when its parent is killed.

    Returns:
        The function; None where the system has no such signals (only Linux has).
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, when_orphaned)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's warning is for the job that runs the point

    return prepare


def finish_point(ended: PointProcess, *, asked_to_stop: bool) -> dict[str, Any]:
    """Read how the process of a point ended, and write outcome.json.

    Args:
        ended: a process that has ended.
        asked_to_stop: it got a signal from the sweep, so an end by a signal is no failure.

    Returns:
        The content of outcome.json.
    """
    seconds = time.monotonic() - ended.started
    ended.stdout.seek(0)
    printed = ended.stdout.read().decode("utf-8", "replace").strip().splitlines()
    ended.stdout.close()
    ended.output.close()
    result: dict[str, Any] = {"status": "failed", "seconds": seconds}
    try:
        if ended.process.returncode == 0:
            last_line = json.loads(printed[-1])
            result |= {key: last_line[key] for key in RESULT_KEYS}
    except (IndexError, ValueError, KeyError):
        pass
    if result["status"] == "failed" and asked_to_stop and ended.process.returncode < 0:
        # The signal came before the process could handle it, or was the second one.
        result |= {"status": "interrupted", "step": None}
    if result["status"] == "failed":
        result["reason"] = _find_reason(ended.process.returncode, ended.folder / OUTPUT_FILE, ended.output_start)
        result["diverged"] = TrainingDiverged.PREFIX in result["reason"]
    write_json(ended.folder / OUTCOME_FILE, result)
    return result


def _find_reason(code: int, output: Path, start: int) -> str:
    """Find why a process failed: the signal, the error that it printed, or its last line."""
    with output.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}, nothing was printed"])[-1]


def describe_outcome(result: dict[str, Any]) -> str:
    """An outcome in words.

    >>> describe_outcome({"status": "failed", "seconds": 61, "reason": "the disk is full"})
    'failed after 0:01:01: the disk is full'
    """
    took = f" after {format_duration(result['seconds'])}" if "seconds" in result else ""
    if result["status"] == "failed":
        return f"failed{took}: {result['reason']}"
    if result["status"] == "interrupted":
        return "stopped" + (f" at step {result['step']}" if result["step"] else "") + took
    loss = (result.get("validation") or {}).get("validation_loss")
    return result["status"] + took + (f", validation loss {loss:.4f}" if isinstance(loss, float) else "")
