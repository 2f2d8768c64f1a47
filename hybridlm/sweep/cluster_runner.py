"""Gives points to a cluster, through one of Hydra's launchers, and waits for them.

The cluster keeps no state of a sweep and the sweep none of the cluster: a point has ended when its outcome.json is
there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hybridlm.errors import ConfigError, counted
from hybridlm.files import write_json
from hybridlm.sweep.folder import (
    LAUNCH_FILE,
    OUTCOME_FILE,
    OUTPUT_FILE,
    STOP_FILE,
    points_to_start,
    prepare_point,
)
from hybridlm.sweep.plan import SweepPlan
from hybridlm.sweep.point import Point
from hybridlm.sweep.process import child_environment, describe_outcome, prepare_child
from hybridlm.sweep.slurm_jobs import find_jobs, find_pending_jobs, update_states
from hybridlm.sweep.stop_request import StopRequest

POLL_INTERVAL_S = 0.5  # between checks of outcomes
SQUEUE_INTERVAL_S = 15.0  # between calls of squeue
SQUEUE_MISSES_OF_LOST_JOB = 2  # successive calls of squeue that do not list a job before it counts as lost
MAX_SAVE_WAIT_S = 60.0  # for points to save when the sweep ends


def run_on_cluster(plan: SweepPlan, *, retry_failed: bool, say: Callable[[str], None],
                   imports: Sequence[str] = ()) -> str | None:
    """Submit the points that are neither finished nor submitted, and wait for all.

    When the sweep is stopped, Slurm's jobs continue; Ray's points are asked to save.

    Args:
        plan: the sweep.
        retry_failed: submit failed points again.
        say: gets a line for everything that happens.
        imports: files and modules that register kinds of the user's own; all machines must find them.

    Returns:
        The name of the signal that ended the waiting, or None.

    Raises:
        ConfigError: there is no Slurm on this machine.
    """
    slurm = plan.sweep.launcher == "slurm"
    pending = find_pending_jobs(plan.folder)
    for job in pending.values():
        say(f"{job.point}: {job.state}, job {job.id}")
    ready = [point for point in points_to_start(plan.points, retry_failed) if point.name not in pending]
    waiting = [*pending, *(point.name for point in ready)]
    missed_looks: Counter[str] = Counter()
    last_look = time.monotonic()
    with StopRequest() as stop, _LauncherProcess(plan, ready, imports) as launcher:
        if ready:
            say(f"{len(ready)} of {counted(len(plan.points), 'point')} to {plan.sweep.launcher}, see {launcher.folder}")
        while waiting:
            launcher_ended = launcher.has_ended()
            waiting = [name for name in waiting if not _say_if_ended(plan.folder, name, say)]
            if slurm and time.monotonic() - last_look > SQUEUE_INTERVAL_S:
                last_look = time.monotonic()
                _fail_lost_jobs(plan.folder, waiting, missed_looks)
            submitted = find_jobs(plan.folder) if launcher_ended or stop.signal_name else {}
            if stop.signal_name:
                if launcher_ended or stop.kill_now or all(name in submitted for name in waiting):
                    break
                launcher.let_points_save()
            elif launcher_ended and any(name not in submitted for name in waiting):
                say(f"{plan.sweep.launcher} has failed: {launcher.last_line()}")
                waiting = [name for name in waiting if name in submitted]
            time.sleep(POLL_INTERVAL_S)
    return stop.signal_name


def _say_if_ended(folder: Path, name: str, say: Callable[[str], None]) -> bool:
    """Whether this point has ended; prints its outcome if so."""
    try:
        outcome = json.loads((folder / "points" / name / OUTCOME_FILE).read_text(encoding="utf-8"))
    except OSError:
        return False
    say(f"{name}: {describe_outcome(outcome)}")
    return True


def _fail_lost_jobs(folder: Path, names: list[str], missed_looks: Counter[str]) -> None:
    """Write a failure for jobs that have left the queue without an outcome; files may come late over a network."""
    jobs = {name: job for name, job in find_jobs(folder).items() if name in names}
    update_states(jobs)
    for name, job in jobs.items():
        missed_looks[name] = missed_looks[name] + 1 if job.state == "gone" else 0
        outcome_file = folder / "points" / name / OUTCOME_FILE
        if missed_looks[name] >= SQUEUE_MISSES_OF_LOST_JOB and not outcome_file.exists():
            reason = f"job {job.id} left the queue without a result (cancelled, its node lost?); see {job.log}"
            write_json(outcome_file, {"status": "failed", "reason": reason})


class _LauncherProcess:
    """The process in which Hydra's launcher works; none where there is no point to launch."""

    def __init__(self, plan: SweepPlan, points: list[Point], imports: Sequence[str]):
        self.slurm = plan.sweep.launcher == "slurm"
        self.folder = _next_folder(plan.folder.absolute() / "jobs")
        self._process: subprocess.Popen[bytes] | None = None
        if not points:
            return
        if self.slurm and (missing := [word for word in ("sbatch", "srun") if shutil.which(word) is None]):
            raise ConfigError("sweep.launcher", f"there is no Slurm here: {missing[0]} is not found", got="slurm",
                              hint="submit from a machine of the cluster, or sweep.launcher=local")
        self.folder.mkdir(parents=True)
        folders = [str(prepare_point(point).absolute()) for point in points]
        write_json(self.folder / LAUNCH_FILE, {
            "launcher": plan.sweep.launcher, "options": plan.sweep.launcher_options, "name": plan.sweep.name,
            "cwd": os.getcwd(), "points": folders})
        import_arguments = [word for name in imports for word in ("--import", name)]
        command = [sys.executable, "-m", "hybridlm.sweep.hydra_launcher", str(self.folder), *import_arguments]
        with (self.folder / OUTPUT_FILE).open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=child_environment(jobs=1),
                start_new_session=True, preexec_fn=prepare_child(signal.SIGTERM if self.slurm else signal.SIGUSR1))

    def has_ended(self) -> bool:
        """Whether all that was launched has ended, or the launcher has failed."""
        return self._process is None or self._process.poll() is not None

    def last_line(self) -> str:
        """The last line that the launcher printed: its error."""
        lines = (self.folder / OUTPUT_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")

    def let_points_save(self) -> None:
        """Ask the points of Ray to save and end; Slurm's jobs continue."""
        if not self.slurm:
            (self.folder / STOP_FILE).touch()

    def __enter__(self) -> _LauncherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """End the launcher: Slurm's jobs do not need it, and Ray's points have saved or are out of time."""
        if self._process is not None and not self.has_ended():
            self.let_points_save()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0 if self.slurm else MAX_SAVE_WAIT_S)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _next_folder(jobs: Path) -> Path:
    """The next free jobs/N."""
    numbers = [int(path.name) for path in jobs.glob("*") if path.name.isdigit()]
    return jobs / str(1 + max(numbers, default=0))
