"""Points as jobs of a cluster: what was submitted, where it stands, and waiting for it.

A sweep's folder gets, for every time that points were submitted:

    jobs/N/launch.json            what was launched, and with what options
    jobs/N/output.txt             what the launcher said
    jobs/N/JOB_submission.sh      Slurm: the script that sbatch got; JOB_submitted.pkl names the job
    jobs/N/JOB_0_log.out, .err    Slurm: what the job said; the point's own output stands with the point

The cluster keeps no memory of a sweep and the sweep needs none of the cluster: a point has ended when its
outcome.json is there. Only whether a Slurm job still waits or runs is asked of squeue.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hybridlm.errors import ConfigError, counted
from hybridlm.files import write_json
from hybridlm.sweep.folder import OUTCOME_FILE, OUTPUT_FILE, begin
from hybridlm.sweep.launch import LAUNCH_FILE, STOP_FILE
from hybridlm.sweep.plan import Point, SweepPlan
from hybridlm.sweep.process import describe, environment, signals_of_a_child
from hybridlm.sweep.run import PATIENCE, Say, Stop, to_do

PAUSE = 0.5  # seconds between looks at outcomes
LOOK = 15.0  # seconds between questions to squeue
SURE = 2  # looks at squeue, one after the other, in which a job without an outcome is missing
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")


@dataclass
class Job:
    """A Slurm job of a point. `state`: queued or running; submitted where squeue cannot say; gone."""

    point: str
    id: str
    folder: Path
    state: str = "submitted"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.id}_0_log.err"


def jobs_of(folder: Path) -> dict[str, Job]:
    """The newest Slurm job of each point of the sweep in `folder`, as far as one was submitted."""
    found: dict[str, Job] = {}
    for launched in sorted((folder / "jobs").glob(f"*/{LAUNCH_FILE}"), key=lambda path: int(path.parent.name)):
        points = [Path(point).name for point in json.loads(launched.read_text(encoding="utf-8"))["points"]]
        for pickle in launched.parent.glob("*_submitted.pkl"):
            number = pickle.name.removesuffix("_submitted.pkl")
            name = points[int(number.partition("_")[2] or 0)]  # 4242, or 4242_1 in an array of jobs
            found[name] = Job(name, number, launched.parent)
    return found


def ask_squeue(jobs: dict[str, Job]) -> None:
    """Sets the state of each job."""
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i %T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return
    states = dict(line.split()[:2] for line in answer.stdout.splitlines() if len(line.split()) > 1)
    for job in jobs.values():
        state = states.get(job.id)
        job.state = "gone" if state is None else "queued" if state in QUEUED else "running"


def in_flight(folder: Path) -> dict[str, Job]:
    """The Slurm jobs of points that have not ended, by point."""
    jobs = {name: job for name, job in jobs_of(folder).items()
            if not (folder / "points" / name / OUTCOME_FILE).exists()}
    if jobs:
        ask_squeue(jobs)
    return {name: job for name, job in jobs.items() if job.state != "gone"}


def run_on_cluster(plan: SweepPlan, *, retry_failed: bool, say: Say) -> str | None:
    """Submit what is neither finished nor submitted, and wait. Returns the name of the signal that ended the waiting.

    Slurm's jobs go on without this process; Ray's points are asked to save.

    Raises:
        ConfigError: there is no Slurm here.
    """
    slurm = plan.sweep.launcher == "slurm"
    before = in_flight(plan.folder)
    for job in before.values():
        say(f"{job.point}: {job.state}, job {job.id}")
    ready = [point for point in to_do(plan.points, retry_failed) if point.name not in before]
    waiting = [*before, *(point.name for point in ready)]
    missed: Counter[str] = Counter()
    asked = time.monotonic()
    with Stop() as stop, _Launcher(plan, ready) as launcher:
        if ready:
            say(f"{len(ready)} of {counted(len(plan.points), 'point')} to {plan.sweep.launcher}, see {launcher.folder}")
        while waiting:
            over = launcher.is_over()
            waiting = [name for name in waiting if not _told(plan.folder, name, say)]
            if slurm and time.monotonic() - asked > LOOK:
                asked = time.monotonic()
                _give_up_lost(plan.folder, waiting, missed)
            sent = jobs_of(plan.folder) if over or stop.requested else {}
            if stop.requested:
                if over or stop.hard or all(name in sent for name in waiting):
                    break
                launcher.let_points_save()
            elif over and any(name not in sent for name in waiting):
                say(f"{plan.sweep.launcher} has failed: {launcher.reason()}")
                waiting = [name for name in waiting if name in sent]
            time.sleep(PAUSE)
    return stop.requested


def _told(folder: Path, name: str, say: Say) -> bool:
    """Has this point ended? If so, say how."""
    try:
        result = json.loads((folder / "points" / name / OUTCOME_FILE).read_text(encoding="utf-8"))
    except OSError:
        return False
    say(f"{name}: {describe(result)}")
    return True


def _give_up_lost(folder: Path, names: list[str], missed: Counter[str]) -> None:
    """A job that has left the queue without an outcome has failed; files may come late over a network."""
    jobs = {name: job for name, job in jobs_of(folder).items() if name in names}
    ask_squeue(jobs)
    for name, job in jobs.items():
        missed[name] = missed[name] + 1 if job.state == "gone" else 0
        if missed[name] >= SURE and not (folder / "points" / name / OUTCOME_FILE).exists():
            reason = f"job {job.id} left the queue without a result (cancelled, its node lost?); see {job.log}"
            write_json(folder / "points" / name / OUTCOME_FILE, {"status": "failed", "reason": reason})


class _Launcher:
    """The process in which Hydra's launcher works; none where no point is to be launched."""

    def __init__(self, plan: SweepPlan, points: list[Point]):
        self.slurm = plan.sweep.launcher == "slurm"
        self.folder = _next(plan.folder.absolute() / "jobs")
        self._process: subprocess.Popen[bytes] | None = None
        if not points:
            return
        if self.slurm and (missing := [word for word in ("sbatch", "srun") if shutil.which(word) is None]):
            raise ConfigError("sweep.launcher", f"there is no Slurm here: {missing[0]} is not found", got="slurm",
                              hint="submit from a machine of the cluster, or sweep.launcher=local")
        self.folder.mkdir(parents=True)
        folders = [str(begin(point).absolute()) for point in points]
        write_json(self.folder / LAUNCH_FILE, {
            "launcher": plan.sweep.launcher, "options": plan.sweep.launcher_options, "name": plan.sweep.name,
            "cwd": os.getcwd(), "points": folders})
        with (self.folder / OUTPUT_FILE).open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hybridlm.sweep.launch", str(self.folder)], stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, env=environment(jobs=1), start_new_session=True,
                preexec_fn=signals_of_a_child(signal.SIGTERM if self.slurm else signal.SIGUSR1))

    def is_over(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def reason(self) -> str:
        """Its last words."""
        lines = (self.folder / OUTPUT_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def let_points_save(self) -> None:
        """Those of Ray; Slurm's jobs go on."""
        if not self.slurm:
            (self.folder / STOP_FILE).touch()

    def __enter__(self) -> _Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        """Slurm's jobs do not need it; Ray's points end with it."""
        if self._process is not None and not self.is_over():
            self.let_points_save()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0 if self.slurm else PATIENCE)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _next(jobs: Path) -> Path:
    return jobs / str(1 + max((int(path.name) for path in jobs.glob("*") if path.name.isdigit()), default=0))
