"""`scripts/dev/chaos.sh`: a few faults for real, and that its comparison finds what it must."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def chaos(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "dev"))
    import chaos

    return chaos


@pytest.mark.slow
def test_a_run_survives_one_fault_of_each_of_five_kinds():
    command = ["bash", ROOT / "scripts/dev/chaos.sh", "--faults", "5", "--ranks", "2", "--seed", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500,
                          env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["differences"] == []
    assert {row["fault"]: row["times"] for row in result["kinds"]} == {
        "SIGKILL of one rank": 1, "damaged checkpoint": 1, "full disk": 1, "SIGTERM": 1, "SIGKILL of the launcher": 1}
    assert all(row["stopped_s"] is None or row["stopped_s"] < 60 for row in result["rows"])


def finished(chaos, folder, **change):
    """The folder of a run of two steps on two ranks; `change` replaces losses and samples."""
    run = chaos.Run(folder, [])
    last = run.checkpoints / "step-2"
    last.mkdir(parents=True)
    (last / "model.safetensors").write_bytes(change.get("weights", b"w"))
    losses = change.get("losses", (3, 2))
    rows = [{"step": step, "loss": loss, "seconds": id(run)} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rank, samples in enumerate(change.get("samples", (([0, 1], [4, 5]), ([2, 3], [6, 7])))):
        rows = [{"step": step, "samples": seen} for step, seen in enumerate(samples, 1)]
        (folder / f"samples-{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.mark.parametrize(("change", "found"), [
    ({}, []),
    ({"losses": (3, 2.5)}, ["step 2: loss is 2 in the quiet run and 2.5 in the other"]),
    ({"losses": (3,)}, ["other: steps [2] missing or too many"]),
    ({"samples": (([0, 1], [4, 5]), ([2, 3], [3, 7]))}, ["other: step 2 saw the samples [3, 4, 5, 7]"]),
    ({"samples": (([0, 1], [4, 5]), ([2, 3],))}, ["other: step 2 saw the samples [4, 5]"]),
])
def test_the_comparison_finds_what_differs(chaos, tmp_path, change, found):
    quiet, other = finished(chaos, tmp_path / "quiet"), finished(chaos, tmp_path / "other", **change)
    assert chaos.differences(quiet, other, steps=2, ranks=2) == found


def test_other_weights_in_the_end_are_found(chaos, tmp_path):
    quiet, other = finished(chaos, tmp_path / "quiet"), finished(chaos, tmp_path / "other", weights=b"v")
    found, = chaos.differences(quiet, other, steps=2, ranks=2)
    assert "model.safetensors" in found


def test_every_kind_of_fault_comes_as_often(chaos):
    import random

    faults = chaos.plan(14, random.Random(0))
    assert sorted(kind for kind, _ in faults) == sorted([*chaos.FAULTS] * 2)
    steps = [step for _, step in faults]
    assert steps == sorted(set(steps))
    assert steps[0] == 3 * chaos.CHECKPOINT_EVERY
