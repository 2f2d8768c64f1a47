"""The Slurm jobs of a sweep: which were submitted, and whether they wait or run.

The folder of a sweep gets, each time that points are submitted:

    jobs/N/launch.json            what was launched, and with which options
    jobs/N/output.txt             what the launcher printed
    jobs/N/JOB_submission.sh      the script that sbatch got; JOB_submitted.pkl names the job
    jobs/N/JOB_0_log.out, .err    what the job printed; the output of the point itself stands with the point

A point has ended when its outcome.json is there, with one exception: a job that was requeued (by `scontrol requeue`, a
preemption, a lost node) may have stopped its point, and starts it again later. So an interrupted point has ended when
its job is out of the queue too. Only squeue is asked whether a job waits or runs.
"""

from __future__ import annotations

import getpass
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hybridlm.sweep.folder import LAUNCH_FILE, OUTCOME_FILE

QUEUED_STATES = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
SQUEUE_TIMEOUT_S = 60.0  # for one call of squeue


@dataclass
class SlurmJob:
    """A Slurm job that runs a point.

    Attributes:
        point: name of the point.
        id: number of the job, 4242, or in an array of jobs 4242_1.
        folder: jobs/N in the folder of the sweep.
        state: queued, running or gone; submitted where squeue cannot be asked.
    """

    point: str
    id: str
    folder: Path
    state: str = "submitted"

    @property
    def log(self) -> Path:
        """The file with the standard error of the job."""
        return self.folder / f"{self.id}_0_log.err"


def find_jobs(folder: Path) -> dict[str, SlurmJob]:
    """Find the newest Slurm job of each point of the sweep in `folder`, by point; only points with a job are listed."""
    jobs: dict[str, SlurmJob] = {}
    for launched in sorted((folder / "jobs").glob(f"*/{LAUNCH_FILE}"), key=lambda path: int(path.parent.name)):
        points = [Path(point).name for point in json.loads(launched.read_text(encoding="utf-8"))["points"]]
        for pickle in launched.parent.glob("*_submitted.pkl"):
            job_id = pickle.name.removesuffix("_submitted.pkl")
            name = points[int(job_id.partition("_")[2] or 0)]
            jobs[name] = SlurmJob(name, job_id, launched.parent)
    return jobs


def update_states(jobs: dict[str, SlurmJob]) -> None:
    """Update the state of each job from squeue; if squeue fails, states do not change."""
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i %T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SQUEUE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return
    states = dict(line.split()[:2] for line in answer.stdout.splitlines() if len(line.split()) > 1)
    for job in jobs.values():
        if job.id not in states:
            job.state = "gone"
        else:
            job.state = "queued" if states[job.id] in QUEUED_STATES else "running"


def find_pending_jobs(folder: Path) -> dict[str, SlurmJob]:
    """Find the Slurm jobs that wait or run for points that have not ended, by point."""
    jobs = find_jobs(folder)
    outcomes = {name: _outcome_status(folder / "points" / name) for name in jobs}
    jobs = {name: job for name, job in jobs.items() if outcomes[name] in ("", "interrupted")}
    if jobs:
        update_states(jobs)
    # Where squeue cannot be asked, an interrupted point counts as ended: its job may never start again.
    gone = {"": ("gone",), "interrupted": ("gone", "submitted")}
    return {name: job for name, job in jobs.items() if job.state not in gone[outcomes[name]]}


def _outcome_status(run_dir: Path) -> str:
    """The status in a point's outcome.json; "" where there is none."""
    try:
        return str(json.loads((run_dir / OUTCOME_FILE).read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
