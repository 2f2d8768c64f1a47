"""Jobs of two nodes on a real Slurm: a signal and resume, a process that dies, names and folders that are not there."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.local_cluster import (
    ROOT,
    TINY,
    data_words,
    environment,
    processes_with,
    slurm,  # noqa: F401  a fixture
    steps_done,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("slurm")


@pytest.fixture
def job(tmp_path):
    """Submits scripts/launch/slurm.sbatch with the words of a run; returns the job's id and its output file."""
    words = [*TINY, *data_words(tmp_path), "engine=ddp", "engine.timeout=60", f"run_dir={tmp_path / 'run'}"]

    def submit(*more, **variables):
        output = tmp_path / "output.txt"
        output.unlink(missing_ok=True)
        done = subprocess.run(
            ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
             "--time=10", f"--output={output}", ROOT / "scripts" / "launch" / "slurm.sbatch", *words, *more],
            env=environment(**{"MASTER_ADDR": "127.0.0.1", **variables}), capture_output=True, text=True, check=True)
        return done.stdout.strip(), output

    return submit


def end_of(job_id, output):
    """Wait for a job's end; returns its state, what it said in lines, and checks that no process is left."""
    def state():
        shown = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True).stdout
        found = re.search(r"JobState=(\w+)", shown)
        return found[1] if found and found[1] not in ("PENDING", "RUNNING", "COMPLETING") else ""

    ended = wait_for(state, f"the end of job {job_id}")
    wait_for(lambda: not processes_with(str(output.parent / "run")), "the end of its processes")
    return ended, output.read_text().splitlines()


def errors(lines):
    assert not [line for line in lines if "Traceback" in line or "frame #" in line], "\n".join(lines)
    return [line for line in lines if line.startswith("error: ")]


def test_a_signal_saves_and_the_same_command_goes_on(job, tmp_path):
    run = tmp_path / "run"
    job_id, output = job("training.steps=100000")
    wait_for(lambda: steps_done(run) >= 3, "some steps")
    subprocess.run(["scancel", "--signal=TERM", job_id], check=True)  # as Slurm does before the time is up
    state, lines = end_of(job_id, output)
    assert state == "COMPLETED", "\n".join(lines)
    saved = steps_done(run)
    assert any(f"SIGTERM: stopped after step {saved}, saved" in line for line in lines)
    job_id, output = job(f"training.steps={saved + 3}")
    state, lines = end_of(job_id, output)
    assert state == "COMPLETED", "\n".join(lines)
    assert any(f"going on from {run / 'checkpoints' / f'step-{saved}'}" in line for line in lines)
    assert steps_done(run) == saved + 3


def test_a_process_that_is_killed_on_one_node_ends_the_job(job, tmp_path):
    run = tmp_path / "run"
    job_id, output = job("training.steps=100000", "training.checkpoint_every=2")
    wait_for(lambda: steps_done(run) >= 3, "some steps")
    victim, = [pid for pid, variables in processes_with(str(run)).items()
               if variables.get("RANK") == "1" and "srun" not in Path(f"/proc/{pid}/comm").read_text()]
    os.kill(victim, signal.SIGKILL)
    state, lines = end_of(job_id, output)
    assert state == "FAILED"
    assert any(re.search(r"srun: error: node\d: task 1: Killed", line) for line in lines)
    said = errors(lines)
    assert len(said) <= 1  # Slurm may end the other one before it has noticed
    assert all("rank 0 lost another process of this run" in line for line in said)
    assert list((run / "checkpoints").glob("step-*"))


def test_a_master_without_an_address_is_one_line(job):
    """The nodes of this Slurm have names that no name service knows, as on a cluster with names of its own."""
    state, lines = end_of(*job("engine.timeout=3", MASTER_ADDR=""))
    assert state == "FAILED"
    said, = errors(lines)
    assert "MASTER_ADDR: " in said
    assert "cannot find a host of this name; got 'node1'" in said
    assert "getent hosts node1" in said


def test_a_node_without_the_run_folder_is_one_line(job, tmp_path):
    (tmp_path / "run").mkdir()
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
[ "$RANK" = 0 ] && exec {sys.executable} "$@"
exec unshare --mount sh -c 'mount -t tmpfs none {tmp_path / "run"} && exec {sys.executable} "$@"' sh "$@"
""")
    python.chmod(0o755)
    state, lines = end_of(*job("training.steps=4", PYTHON=str(python)))
    assert state == "FAILED"
    said, = errors(lines)
    assert "error: run_dir: is on" in said
    assert "a folder on a file system that all machines share" in said
