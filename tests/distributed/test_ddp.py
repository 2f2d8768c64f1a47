"""`hybridlm train` starts several processes: the losses of one, resume on another number of them, no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridlm.cli import main
from tests.support.run_records import records

TINY = ["model.hidden_size=32", "model.vocab_size=257", "data.tokenizer=bytes", "training.batch_size=4",
        "training.sequence_length=64", "training.eval_every=0", "training.eval_batches=2", "training.log_every=1000"]
STEPS = "training.steps=8"
KIMI = ["model=kimi_linear_tiny", "model.num_layers=2", "model.schedule.ratio=1", *TINY]


def start(words, **env):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-m", "hybridlm.cli", "train", *words], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env})


def ranks(number):
    return ["engine=ddp", f"engine.num_processes={number}"]


def assert_same_losses(folder, expected):
    found, wanted = records(folder), records(expected)
    assert [r["step"] for r in found] == [r["step"] for r in wanted]
    for a, b in zip(found, wanted, strict=True):
        for key in ("loss", "total_loss", "grad_norm", "samples", "tokens", "bits_per_byte"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])
    assert found[-1]["validation_loss"] == pytest.approx(wanted[-1]["validation_loss"], rel=1e-5)


def wait_for(path, process, seconds=120.0):
    limit = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture(scope="module")
def quiet(data_words, tmp_path_factory):
    """One process, 8 steps, each batch at once."""
    folder = tmp_path_factory.mktemp("quiet") / "run"
    assert main(["train", *KIMI, *data_words, STEPS, f"run_dir={folder}"]) == 0
    return folder


def test_two_ranks_stopped_and_resumed_on_one_lose_nothing(data_words, quiet, tmp_path):
    """A signal to one rank alone reaches all; the rest of the run needs no second process."""
    folder = tmp_path / "run"
    words = [*KIMI, *data_words, STEPS, f"run_dir={folder}", "training.checkpoint_every=2"]
    process = start([*words, *ranks(2)])
    wait_for(folder / "checkpoints" / "step-2", process)
    children = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                                   text=True).stdout.split()]
    assert len(children) == 2
    os.kill(children[-1], signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.index("memory of each process, an estimate: ") < out.index("model kimi_linear_tiny: ")
    assert "SIGTERM: stopped after step" in out
    assert "Go on with: hybridlm train" in out
    stopped = records(folder)[-1]["step"]
    assert (folder / "checkpoints" / f"step-{stopped}").is_dir()
    assert main(["train", *words]) == 0
    assert_same_losses(folder, quiet)


def test_a_killed_rank_ends_all_and_a_restart_goes_on(data_words, quiet, tmp_path):
    folder = tmp_path / "run"
    words = [*KIMI, *data_words, STEPS, f"run_dir={folder}", "training.checkpoint_every=2", *ranks(2)]
    process = start([*words, "--restarts", "1"])
    wait_for(folder / "checkpoints" / "step-2", process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "starting again from the last checkpoint (1 of 1 restarts)" in err
    assert "Traceback" not in err
    assert_same_losses(folder, quiet)


@pytest.mark.parametrize(("words", "started"), [(["--restarts", "2"], (1, 2)), (ranks(2), (2, 0))])
def test_processes_and_restarts_are_handed_to_the_launcher(words, started, monkeypatch, tmp_path):
    """A run that may restart has a launcher also where it is one process."""
    asked = []
    monkeypatch.setattr("hybridlm.distributed.launch.launch", lambda *call: asked.append(call) or 0)
    words = [*KIMI, f"run_dir={tmp_path / 'run'}", *words]
    assert main(["train", *words]) == 0
    assert asked == [(["train", *words], *started)]


@pytest.mark.parametrize(("words", "message"), [
    (ranks(3), "training.batch_size: must be a multiple of the number of processes; got 4; expected a multiple of 3"),
    (ranks(0), "engine.num_processes: must be at least 1"),
    (["engine.num_processes=2"], "add engine=ddp"),
    (["--restarts", "-1"], "--restarts: must not be negative"),
])
def test_refused_before_anything_starts(words, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", *KIMI, *words, f"run_dir={folder}"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not folder.exists()


def test_more_processes_than_gpus_are_refused_before_they_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert main(["train", *KIMI, *ranks(4), f"run_dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == ("error: engine.num_processes: more processes than GPUs on this machine; got 4; "
                                       "expected at most 2; engine.device=cpu leaves the GPUs alone\n")


def test_the_wrong_engine_under_a_launcher_is_said(monkeypatch, tmp_path, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *KIMI, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "single runs one process; got '2 processes'; expected ddp" in capsys.readouterr().err
