"""Gives points to a cluster, through one of Hydra's launchers, and waits for them.

The cluster keeps no state of a sweep and the sweep none of the cluster: a point has ended when its outcome.json is
there, and an interrupted one when its job has left the queue too (`hybridlm.sweep.slurm_jobs`).
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
from typing import Any

from hybridlm.errors import ConfigError, counted
from hybridlm.files import write_json
from hybridlm.sweep.folder import (
    LAUNCH_FILE,
    OUTCOME_FILE,
    OUTPUT_FILE,
    STOP_FILE,
    is_busy,
    points_to_start,
    prepare_point,
)
from hybridlm.sweep.plan import SweepPlan
from hybridlm.sweep.point import Point
from hybridlm.sweep.process import child_environment, describe_outcome, prepare_child
from hybridlm.sweep.progress import Progress
from hybridlm.sweep.slurm_jobs import find_jobs, find_pending_jobs, update_states
from hybridlm.sweep.stop_request import StopRequest

POLL_INTERVAL_S = 0.5  # between checks of outcomes
SQUEUE_INTERVAL_S = 15.0  # between calls of squeue
SQUEUE_MISSES_OF_LOST_JOB = 2  # successive calls of squeue that do not list a job before it counts as lost
MAX_SAVE_WAIT_S = 60.0  # for points to save when the sweep ends


def run_on_cluster(plan: SweepPlan, *, retry_failed: bool, say: Callable[[str], None],
                   imports: Sequence[str] = (), progress: Progress | None = None) -> str | None:
    """Submit the points that are neither finished nor submitted, and wait for all.

    When the sweep is stopped, Slurm's jobs continue; Ray's points are asked to save.

    Args:
        plan: the sweep.
        retry_failed: submit failed points again.
        say: gets a line for everything that happens.
        imports: files and modules that register kinds of the user's own; all machines must find them.
        progress: prints now and then how far the running points are.

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
    queue = _Queue(plan.folder, [*pending, *(point.name for point in ready)], say, progress, asks_squeue=slurm)
    with StopRequest() as stop, _LauncherProcess(plan, ready, imports) as launcher:
        if ready:
            say(f"{len(ready)} of {counted(len(plan.points), 'point')} to {plan.sweep.launcher}, see {launcher.folder}")
        while queue.waiting:
            launcher_ended = launcher.has_ended()
            queue.look()
            submitted = find_jobs(plan.folder) if launcher_ended or stop.signal_name else {}
            if stop.signal_name:
                if launcher_ended or stop.kill_now or all(name in submitted for name in queue.waiting):
                    break
                launcher.let_points_save()
            elif launcher_ended and any(name not in submitted for name in queue.waiting):
                say(f"{plan.sweep.launcher} has failed: {launcher.last_line()}")
                queue.waiting = [name for name in queue.waiting if name in submitted]
            time.sleep(POLL_INTERVAL_S)
    return stop.signal_name


class _Queue:
    """Points that a sweep waits for, and what it last knew of each.

    Attributes:
        waiting: names of the points that have not ended.
    """

    def __init__(self, folder: Path, waiting: list[str], say: Callable[[str], None], progress: Progress | None, *,
                 asks_squeue: bool):
        self.folder = folder
        self.waiting = waiting
        self.say = say
        self.progress = progress
        self._running: set[str] = set()
        self.asks_squeue = asks_squeue
        self._missed: Counter[str] = Counter()  # successive calls of squeue that did not list a point's job
        self._said: dict[str, set[str]] = {}  # what was said of a point since it was last started
        self._last_look = time.monotonic()

    def look(self) -> None:
        """Say which points have ended, and stop waiting for them."""
        if self.asks_squeue and time.monotonic() - self._last_look > SQUEUE_INTERVAL_S:
            self._last_look = time.monotonic()
            self._ask_squeue()
        self.waiting = [name for name in self.waiting if not self._has_ended(name)]
        if self.progress is not None:
            self._follow(self.progress)

    def _follow(self, progress: Progress) -> None:
        """Tell the progress which points have started and ended since the last look; a running point is locked."""
        busy = {name for name in self.waiting if self._outcome(name) is None
                and is_busy(self.folder / "points" / name)}
        for name in self._running - busy:
            outcome = self._outcome(name)
            progress.ended(name, finished=outcome is not None and outcome["status"] == "finished")
        for name in busy - self._running:
            progress.started(name)
        self._running = busy
        progress.tick([name for name in self.waiting if name not in busy])

    def _outcome(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / "points" / name / OUTCOME_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _has_ended(self, name: str) -> bool:
        outcome = self._outcome(name)
        if outcome is None:
            self._said.pop(name, None)  # a requeued job has started the point again
            return False
        self._say_once(name, describe_outcome(outcome))
        requeued = self.asks_squeue and outcome["status"] == "interrupted"
        return not requeued or self._missed[name] >= SQUEUE_MISSES_OF_LOST_JOB

    def _ask_squeue(self) -> None:
        """Count the jobs that have left the queue; one without an outcome has failed. Files may come late over a
        network, so one look is not enough."""
        jobs = {name: job for name, job in find_jobs(self.folder).items() if name in self.waiting}
        update_states(jobs)
        for name, job in jobs.items():
            outcome = self._outcome(name)
            unknown = job.state == "submitted" and outcome is not None  # squeue cannot be asked
            self._missed[name] = self._missed[name] + 1 if job.state == "gone" or unknown else 0
            if job.state == "queued" and outcome is not None:
                self._say_once(name, f"in the queue again, job {job.id}")
            if self._missed[name] >= SQUEUE_MISSES_OF_LOST_JOB and outcome is None:
                reason = f"job {job.id} left the queue without a result (cancelled, its node lost?); see {job.log}"
                write_json(self.folder / "points" / name / OUTCOME_FILE, {"status": "failed", "reason": reason})

    def _say_once(self, name: str, text: str) -> None:
        if text not in self._said.setdefault(name, set()):
            self._said[name].add(text)
            self.say(f"{name}: {text}")


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
