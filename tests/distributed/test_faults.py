"""What goes wrong between processes is said once, in one line, and ends all of them. One subprocess for all cases."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridlm.distributed import launch
from hybridlm.distributed.rendezvous import check_same
from hybridlm.errors import ConfigError

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root = SUPPORT.parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(SUPPORT / "faults_driver.py"), str(tmp_path_factory.mktemp("faults"))],
                          env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
                               "TORCH_CPP_LOG_LEVEL": "ERROR"},
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_nan_of_one_rank_skips_the_step_on_all(outcomes):
    found = outcomes["one is harmed"]
    assert found["codes"] == [0, 0], found["said"]
    assert [record["skipped"] for record in found["records"]] == [False, False, True, False, False, False]
    assert all(record["loss"] is not None for record in found["records"][3:])


def test_a_full_disk_of_one_rank_costs_the_checkpoint_alone(outcomes):
    found = outcomes["one is harmed"]
    first, second = found["said"]
    assert found["checkpoints"] == ["step-4", "step-6"]
    assert first.count("step-2 could not be saved ([Errno 28] No space left on device)") == 1
    assert second == ""


@pytest.mark.parametrize(("case", "words"), [
    ("other architecture", ["the model of the run in", "has changed: layer 0: mixer kda -> full"]),
    ("newer checkpoint", ["has format", "this version reads up to 0; update hybridlm"]),
    ("other versions", ["rank 1 has versions of its own: torch 1.0 (rank 0: 2.", "same packages on every machine"]),
    ("other configs", ["rank 1 has a config of its own: training.steps 9 (rank 0: 6)"]),
    ("damaged shard", ["token shard", "does not match its checksum; delete the folder", "to prepare it again"]),
])
def test_what_all_ranks_meet_is_said_by_the_first_alone(outcomes, case, words):
    found = outcomes[case]
    first, second = found["said"]
    assert found["codes"] == [2, 2], found["said"]
    assert second == ""
    assert len(first.splitlines()) == 1, first
    assert all(word in first for word in words), first
    assert found.get("file", "") in first


@pytest.mark.parametrize(("case", "words"), [
    ("first absent", "MASTER_ADDR: no answer within 2 s (engine.timeout); got '127.0.0.1:"),
    ("second absent", "engine: 1 of 2 processes came to 127.0.0.1:"),
    ("port taken", "MASTER_PORT: another program listens on this port; got '"),
])
def test_processes_that_do_not_meet_end_in_time(outcomes, case, words):
    found = outcomes[case]
    assert set(found["codes"]) == {2}, found["said"]
    assert found["seconds"] < 60
    line = found["said"][0]
    assert len(line.splitlines()) == 1, line
    assert words in line


class Brought:
    def __init__(self, *values):
        self.values = values

    def gather(self, value):
        return list(self.values) if isinstance(value, dict) else [str(v) for v in self.values]


def test_many_differences_are_counted():
    first, other = (dict.fromkeys("abcdef", number) for number in (1, 2))
    with pytest.raises(ConfigError, match=r"rank 2 has words of its own: a 2 \(rank 0: 1\), .* and 2 more; do this"):
        check_same(Brought(first, first, other), "words", first, "do this")
    check_same(Brought(first, first), "words", first, "do this")


def test_the_launcher_sees_any_rank_end(monkeypatch):
    """Also one that ends before the others have met it: they would wait for it."""
    real = subprocess.Popen

    def start(command, **options):
        return real([sys.executable, "-c", "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else "
                     "sys.exit(3)"], **options)

    monkeypatch.setattr(launch.subprocess, "Popen", start)
    begin = time.monotonic()
    assert launch.launch(["train"], 2) == 3
    assert time.monotonic() - begin < 30
