"""Points as jobs of a real Slurm: a cancelled one, a requeued one, one whose time is over, and some that finish."""

import json
import re
import subprocess
import sys

import pytest

from tests.support.local_cluster import (
    PATIENCE_S,
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
def sweep(tmp_path):
    """Starts `hybridlm sweep` with Slurm as a process whose output is in output.txt."""
    pytest.importorskip("submitit")
    words = [*TINY, *data_words(tmp_path), "sweep.launcher=slurm", "sweep.slurm.mem_gb=null",
             f"sweep.dir={tmp_path / 'out'}"]
    started = []

    def start(*more):
        with (tmp_path / "output.txt").open("wb") as output:
            started.append(subprocess.Popen([sys.executable, "-m", "hybridlm.cli", "sweep", *words, *more],
                                            stdout=output, stderr=output, env=environment()))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
    subprocess.run(["scancel", "--user=root"], check=False)
    wait_for(lambda: not processes_with(str(tmp_path / "out")), "the end of the points")


def jobs():
    """State and number of restarts of each job in the queue, by id (4242_1 in an array)."""
    shown = subprocess.run(["squeue", "--noheader", "--array", "--format=%i %T"], capture_output=True, text=True,
                           check=True).stdout
    return dict(line.split() for line in shown.splitlines())


def test_points_finish_and_are_not_submitted_again(sweep, tmp_path):
    assert sweep("training.seed=0,1", "training.steps=2", "sweep.slurm.timeout_min=5").wait(PATIENCE_S) == 0
    said = (tmp_path / "output.txt").read_text()
    assert "2 of 2 points are finished" in said
    assert sweep("training.seed=0,1", "training.steps=2", "sweep.slurm.timeout_min=5").wait(PATIENCE_S) == 0
    assert [path.name for path in (tmp_path / "out" / "jobs").iterdir()] == ["1"]


def starts(point):
    """How often the process of a point was started."""
    file = point / "output.txt"
    return file.read_text().count("$ ") if file.exists() else 0


def wait_for_resume(point):
    """Wait until a point has been started again, has gone on from a checkpoint, and has trained on."""
    wait_for(lambda: starts(point) == 2, "the second start")
    saved = wait_for(lambda: re.search(r"going on from .*step-(\d+)", (point / "output.txt").read_text()), "its resume")
    wait_for(lambda: steps_done(point) > int(saved[1]), "its steps")


def test_a_cancelled_point_has_saved_and_a_requeued_one_goes_on(sweep, tmp_path):
    cancelled, requeued = (tmp_path / "out" / "points" / f"seed-{seed}" for seed in (0, 1))
    process = sweep("training.seed=0,1", "training.steps=1000000", "sweep.slurm.timeout_min=30")
    wait_for(lambda: steps_done(cancelled) >= 2 and steps_done(requeued) >= 2, "first steps of both points")
    first, second = sorted(jobs())
    subprocess.run(["scancel", first], check=True)
    subprocess.run(["scontrol", "requeue", second], check=True)
    wait_for_resume(requeued)
    outcome = json.loads((cancelled / "outcome.json").read_text())
    assert outcome["status"] == "interrupted"
    assert (cancelled / "checkpoints" / f"step-{outcome['step']}").is_dir()
    assert starts(cancelled) == 1
    assert process.poll() is None  # it waits for the point that runs again
    subprocess.run(["scancel", second], check=True)
    assert process.wait(PATIENCE_S) == 1
    said = (tmp_path / "output.txt").read_text()
    assert f"seed-0: stopped at step {outcome['step']}" in said
    assert said.count("seed-1: stopped at step") == 2
    assert "0 of 2 points are finished" in said


def test_a_point_whose_time_is_over_saves_and_starts_again(sweep, tmp_path):
    points = [tmp_path / "out" / "points" / f"seed-{seed}" for seed in (0, 1)]
    process = sweep("training.seed=0,1", "training.steps=1000000", "sweep.slurm.timeout_min=3",
                    "sweep.slurm.signal_delay_s=60", "sweep.slurm.max_num_timeout=3")
    wait_for(lambda: all(steps_done(point) >= 2 for point in points), "first steps of both points")
    for point in points:
        wait_for_resume(point)
    assert process.poll() is None
    assert not [point for point in points if (point / "outcome.json").exists()]


def test_a_time_limit_below_its_warning_is_refused(sweep, tmp_path):
    assert sweep("training.seed=0,1", "sweep.slurm.timeout_min=1").wait(PATIENCE_S) == 2
    line, = (tmp_path / "output.txt").read_text().splitlines()
    assert line.startswith("error: sweep.slurm.timeout_min: is over before the point has started")
