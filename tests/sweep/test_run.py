"""Points as processes: what runs, what is skipped, why one failed, stopping and going on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from hybridlm.cli import main
from hybridlm.sweep import estimate, local_runner, process
from hybridlm.sweep.folder import SweepFolder, point_outcome
from hybridlm.sweep.plan import make_plan
from hybridlm.training.run_folder import RunFolder

SUPPORT = Path(__file__).parents[1] / "support"
ROOT = SUPPORT.parents[1]


def stand_in_command(file, imports):
    return [sys.executable, str(SUPPORT / "fake_train.py"), str(file)]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(process, "point_command", stand_in_command)
    monkeypatch.setattr(estimate, "peak_flops", lambda *_: (1.0, "made up"))  # too slow to measure steps


def words(folder, seeds, *more):
    return ["model=hybrid_tiny", "training.steps=20", f"training.seed={seeds}", f"sweep.dir={folder}", *more]


def starts(folder):
    return {path.parent.name: len(path.read_text().split()) for path in sorted(folder.glob("points/*/starts"))}


def test_finished_points_are_skipped_and_failed_ones_wait_to_be_asked_for(fake, tmp_path, capsys):
    assert main(["sweep", *words(tmp_path, "0,1,2"), "--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert "failed: seed-1: the disk is full; make room" in out
    assert "failed: seed-2: killed by SIGKILL" in out
    assert "2 of 3 points failed" in out
    assert "1 of 3 points are finished" in out
    assert "going well" in (tmp_path / "points" / "seed-1" / "output.txt").read_text()
    assert main(["sweep", *words(tmp_path, "0,1,2")]) == 1
    assert starts(tmp_path) == {"seed-0": 1, "seed-1": 1, "seed-2": 1}
    (tmp_path / "points" / "seed-1" / "mended").touch()
    assert main(["sweep", *words(tmp_path, "0,1,2"), "--retry-failed", "--json"]) == 1
    assert starts(tmp_path) == {"seed-0": 1, "seed-1": 2, "seed-2": 2}
    captured = capsys.readouterr()
    points = json.loads(captured.out.splitlines()[-1])["points"]
    assert [point["status"] for point in points] == ["finished", "finished", "failed"]
    assert points[2]["reason"].startswith("killed by SIGKILL")


def test_lists_may_grow_and_more_steps_start_finished_points_again(fake, tmp_path):
    assert main(["sweep", *words(tmp_path, "0,4")]) == 0
    assert main(["sweep", *words(tmp_path, "0,4,5")]) == 0
    assert starts(tmp_path) == {"seed-0": 1, "seed-4": 1, "seed-5": 1}
    seconds, how = estimate.estimate(make_plan(words(tmp_path, "0,4,5,6")).points, measure=False)
    assert (seconds, how) == ([40.0] * 4, "from what 3 finished points took")
    plan = make_plan(words(tmp_path, "0,4,5", "training.steps=30"))
    assert [point_outcome(point)["status"] for point in plan.points] == ["waiting"] * 3


OTHERS = [(["training.seed=0,5"], ["holds another sweep", "seed-4"]),
          (["optimizer.lr=0.5"], ["holds another sweep", "point seed-0", "optimizer.lr 0.001 -> 0.5"]),
          (["model.schedule.ratio=1"], ["holds another sweep", "has changed"])]


def test_a_folder_of_another_sweep_is_refused_and_left_alone(fake, tmp_path, capsys):
    assert main(["sweep", *words(tmp_path, "0,4", "optimizer.lr=1e-3")]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more, says in OTHERS:
        capsys.readouterr()
        assert main(["sweep", *words(tmp_path, "0,4", "optimizer.lr=1e-3"), *more]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert all(part in line for part in [*says, "sweep.dir"]), line
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_sweep_is_refused(fake, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main(["sweep", *words(tmp_path, "0,4")]) == 2
    assert "holds something that is no sweep (thesis.tex)" in capsys.readouterr().err


def start(folder, seeds):
    """A sweep in a process of its own, with the stand-in for training."""
    code = ("import sys; from hybridlm.sweep import process; from hybridlm.cli import main\n"
            f"fake = {str(SUPPORT / 'fake_train.py')!r}\n"
            "process.point_command = lambda file, imports: [sys.executable, fake, str(file)]\n"
            f"sys.exit(main(['sweep', *{words(str(folder), seeds)!r}]))")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
                            stdout=subprocess.DEVNULL)


def wait_for(path, seconds=60.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


def test_a_sweep_that_is_stopped_lets_points_save_and_goes_on(tmp_path, fake, capsys):
    def stop():
        wait_for(tmp_path / "points" / "seed-3" / "listening")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert main(["sweep", *words(tmp_path, "3,0")]) == 0
    thread.join()
    out = capsys.readouterr().out
    assert "seed-3: stopped at step 1" in out
    assert "SIGTERM: go on with: hybridlm sweep model=hybrid_tiny" in out
    assert starts(tmp_path) == {"seed-3": 1}
    assert main(["sweep", *words(tmp_path, "3,0")]) == 0
    assert starts(tmp_path) == {"seed-0": 1, "seed-3": 2}


def test_a_sweep_that_is_killed_leaves_no_process_behind_and_goes_on(tmp_path, fake):
    sweep = start(tmp_path, "3,0")
    wait_for(tmp_path / "points" / "seed-3" / "listening")
    sweep.kill()
    sweep.wait(timeout=60)
    wait_for(tmp_path / "points" / "seed-3" / "stopped")  # its point was told, so that it could save
    assert main(["sweep", *words(tmp_path, "3,0")]) == 0
    assert starts(tmp_path) == {"seed-0": 1, "seed-3": 2}


def test_a_point_that_another_process_trains_is_left_to_it(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setattr(local_runner, "MAX_BUSY_WAIT_S", 0.2)
    with closing(RunFolder(tmp_path / "points" / "seed-0")):
        assert main(["sweep", *words(tmp_path, "0,4")]) == 1
    out = capsys.readouterr().out
    assert "seed-0: left out, another process is training there" in out
    assert "1 of 2 points are finished" in out
    assert starts(tmp_path) == {"seed-4": 1}


def test_one_process_runs_a_sweep(tmp_path, fake, capsys):
    plan = make_plan(words(tmp_path, "0,4"))
    with closing(SweepFolder(plan)):
        assert main(["sweep", *words(tmp_path, "0,4")]) == 2
    assert "another process runs this sweep" in capsys.readouterr().err


def test_a_real_sweep_of_two_ratios_with_a_probe_runs_end_to_end(tmp_path, capsys):
    data = Path(json.__file__).parent
    sweep = ["model=hybrid_tiny", "model.num_layers=2", "model.schedule.ratio=0,inf", "sweep.match=params",
             "training.steps=3", "training.sequence_length=32", "training.batch_size=2", "training.eval_batches=1",
             f"data.path={data / 'decoder.py'}", f"data.validation_path={data / 'encoder.py'}",
             f"data.cache_dir={tmp_path / 'cache'}",
             "sweep.probes=[{name: parity, length: 3, lengths: [3, 5], steps: 2, batch_size: 2, examples: 4}]",
             f"sweep.dir={tmp_path / 'out'}", "engine.device=cpu"]
    assert main(["sweep", *sweep, "--jobs", "2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    for point in results["points"]:
        assert point["status"] == "finished"
        assert 4 < point["metrics"]["validation_loss"] < 8
        assert {"probe/parity/accuracy", "probe/parity/accuracy@5"} <= set(point["metrics"])
        assert (Path(point["run_dir"]) / "checkpoints" / "step-3" / "model.safetensors").exists()
    sizes = [point["parameters"] for point in results["points"]]
    assert sizes[0] != sizes[1]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.01
