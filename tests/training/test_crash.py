"""Runs that are killed or stopped end with exactly the numbers of a run that was not. One subprocess for all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(SUPPORT), str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(SUPPORT / "crash_driver.py"), str(tmp_path_factory.mktemp("crash"))],
                          env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_quiet_run_is_whole(outcomes):
    quiet = outcomes["quiet"]
    assert [s["code"] for s in quiet["sessions"]] == [0]
    assert list(quiet["losses"]) == [str(step) for step in range(1, 9)]
    assert quiet["sessions"][0]["steps"] == [6, 8]


def sessions(outcome):
    """Exit code, whole checkpoints and drafts that each session left."""
    return [(s["code"], s["steps"], s["drafts"]) for s in outcome["sessions"]]


def test_kills_leave_whole_checkpoints_alone(outcomes):
    assert sessions(outcomes["killed"]) == [
        (-9, [], 0),  # before any save
        (-9, [], 1),  # in the middle of the first one
        (-9, [3], 0),  # between two; the draft is gone
        (-9, [3], 1),  # with all files written, before the rename
        (-9, [3, 6], 0),
        (0, [6, 8], 0)]


def test_stops_save_and_leave_with_0_and_a_second_ctrl_c_leaves_at_once(outcomes):
    assert sessions(outcomes["stopped"]) == [(0, [2], 0), (0, [3, 5], 0), (1, [5, 6], 0), (0, [6, 8], 0)]


def test_faults_while_a_thread_writes(outcomes):
    assert sessions(outcomes["in background"]) == [
        (-9, [], 1),  # in the middle of the first save
        (-9, [3], 1),  # in the middle of the second
        (0, [6, 7], 0),  # stopped in step 7 while step 6 was being written: both are there
        (0, [7, 8], 0)]


@pytest.mark.parametrize("name", ["killed", "stopped", "in background"])
def test_next_losses_are_bitwise_those_of_the_quiet_run(outcomes, name):
    quiet, run = outcomes["quiet"], outcomes[name]
    assert run["losses"] == quiet["losses"]
    assert run["weights"] == quiet["weights"]
    assert run["lines"] == 8


def test_a_stop_prints_the_resume_command(outcomes):
    first, second, *_ = [s["out"] for s in outcomes["stopped"]["sessions"]]
    assert "Ctrl-C: finishing this step" in first
    assert "Go on with: hybridlm train " in first
    assert "SIGTERM: stopped after step 5, saved" in second
    assert "going on from" in second
