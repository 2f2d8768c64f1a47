"""The process of one point: a `hybridlm train` in a group of its own, and what is read from how it ended."""

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import hybridlm
import hybridlm_kernels
from hybridlm.config.serialization import from_dict, load_yaml
from hybridlm.files import write_json
from hybridlm.sweep.folder import OUTCOME_FILE, OUTPUT_FILE, POINT_FILE
from hybridlm.sweep.probes import WORK_FILE, PointWork
from hybridlm.training.display import duration

_PR_SET_PDEATHSIG = 1


@dataclass
class PointProcess:
    """A point that runs in its run folder."""

    folder: Path
    process: subprocess.Popen[bytes]
    stdout: IO[bytes]
    output: IO[bytes]
    output_start: int
    started: float = field(default_factory=time.monotonic)

    def signal(self, number: int) -> None:
        """To the whole session of the point, its data workers included."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def start(folder: Path, *, jobs: int = 1, cwd: str | None = None) -> PointProcess:
    """Train the point whose config stands in `folder`; `jobs` points share the cores.

    Paths in the config are relative to `cwd`, by default that of this process.
    """
    words = command(folder / POINT_FILE)
    output = (folder / OUTPUT_FILE).open("ab")
    output.write(f"$ {shlex.join(words)}\n".encode())
    output.flush()
    stdout = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stdout, stderr=output, env=environment(jobs),
                               cwd=cwd, start_new_session=True, preexec_fn=signals_of_a_child(signal.SIGTERM))
    return PointProcess(folder, process, stdout, output, output.tell())


def command(file: Path) -> list[str]:
    """A plain training where there is nothing else to do."""
    if from_dict(PointWork, load_yaml(file.parent / WORK_FILE)) != PointWork():
        return [sys.executable, "-m", "hybridlm.sweep.probes", str(file.parent)]
    return [sys.executable, "-m", "hybridlm.cli", "train", str(file), "--json"]


def environment(jobs: int) -> dict[str, str]:
    """That of this process; the same packages are found, and several points share the cores."""
    packages = [Path(package.__file__ or "").resolve().parents[1] for package in (hybridlm, hybridlm_kernels)]
    ours = [str(path) for path in packages if path.name not in ("site-packages", "dist-packages")]
    before = os.environ.get("PYTHONPATH", "")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*ours, *([before] if before else [])])}
    if jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return env


def signals_of_a_child(when_orphaned: int) -> Callable[[], None] | None:
    """Where the system can, a process gets a signal when the one that started it is killed."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, when_orphaned)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's warning is for the job that runs the point

    return prepare


def finish(ended: PointProcess, *, asked_to_stop: bool) -> dict[str, Any]:
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
        result["reason"] = _reason(ended.process.returncode, ended.folder / OUTPUT_FILE, ended.output_start)
    write_json(ended.folder / OUTCOME_FILE, result)
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


def describe(result: dict[str, Any]) -> str:
    """An outcome in words."""
    took = f" after {duration(result['seconds'])}" if "seconds" in result else ""
    if result["status"] == "failed":
        return f"failed{took}: {result['reason']}"
    if result["status"] == "interrupted":
        return "stopped" + (f" at step {result['step']}" if result["step"] else "") + took
    loss = (result.get("validation") or {}).get("validation_loss")
    return result["status"] + took + (f", validation loss {loss:.4f}" if isinstance(loss, float) else "")
