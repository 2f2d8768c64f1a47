"""Saves that a thread writes while training goes on, in one process. test_crash.py kills and stops such runs."""

import threading

import pytest

from hybridlm import checkpoint
from hybridlm.checkpoint import saving
from hybridlm.training import train
from hybridlm.training.trainer import Trainer
from tests.support import tiny_run


def hold_back(monkeypatch, step, failing=False):
    """What is saved after `step` is written when the next step has been made; or has `failing` raised an error."""
    write, make, due, seen = saving._write_tensors, Trainer._step, threading.Event(), []

    def late(file, tensors):
        if f"step-{step}-" in file.parent.name:
            seen.append(due.wait(60))
        return write(file, tensors)

    def made(trainer, *rest):
        make(trainer, *rest)
        if trainer.progress.step > step:
            due.set()
            if failing:
                raise RuntimeError("lost")

    monkeypatch.setattr(saving, "_write_tensors", late)
    monkeypatch.setattr(Trainer, "_step", made)
    return seen


def test_what_a_thread_writes_a_step_late_is_what_training_waits_for(tmp_path, monkeypatch):
    """Training changes weights and moments in place meanwhile: the thread must have copies."""
    options = {"steps": 5, "optimizer": {"kind": "muon"}}
    train(tiny_run.config(tmp_path / "waiting", async_checkpoint=False, **options))
    seen = hold_back(monkeypatch, 3)
    train(tiny_run.config(tmp_path / "beside", **options))
    assert seen == [True, True]  # weights, optimizer
    for step in (3, 5):
        waiting, beside = ({file.name: file.read_bytes() for file in
                            (tmp_path / name / f"run/checkpoints/step-{step}").glob("*.safetensors")}
                           for name in ("waiting", "beside"))
        assert len(waiting) == 2
        assert waiting == beside
    assert tiny_run.losses(tmp_path / "waiting/run") == tiny_run.losses(tmp_path / "beside/run")


def test_an_error_of_training_leaves_the_save_whole(tmp_path, monkeypatch):
    seen = hold_back(monkeypatch, 3, failing=True)
    with pytest.raises(RuntimeError, match="lost"):
        train(tiny_run.config(tmp_path))
    assert seen == [True, True]
    assert checkpoint.newest(tmp_path / "run/checkpoints").name == "step-3"
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1
