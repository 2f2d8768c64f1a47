"""Runs in a process of its own: trains in forked children that are killed, stopped and started again.

    python crash_driver.py FOLDER      prints one JSON object: scenario -> what happened

Forking after the imports saves seconds per child. Nothing here runs torch before it forks.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import accelerate  # noqa: F401
import torch
import torch._dynamo  # the optimizers import it on their first step

from hybridlm import checkpoint
from hybridlm.checkpoint import folder as files
from hybridlm.checkpoint import saving
from hybridlm.cli import main
from hybridlm.config.serialization import to_yaml
from hybridlm.run_config import load_config
from hybridlm.training import run
from hybridlm.training.trainer import Trainer
from tests.support import tiny_run


def child(folder, harm=None):
    """Exit code (negative: the signal) of one `hybridlm train` in `folder`; what it printed is in out.txt."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 70
    try:
        torch.set_num_threads(1)
        out = os.open(folder / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if harm is not None:
            harm()
        code = main(["train", str(folder / "tiny.yaml")])
        sys.stdout.flush()
    finally:
        os._exit(code)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, condition, action):
    """Do `action` before `owner.name` runs with arguments that meet `condition`."""
    original = getattr(owner, name)

    def replaced(*args, **kwargs):
        if condition(*args):
            action()
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def kill_in_save(step, file):
    return lambda: before(files, "_sha256", lambda f: f.parent.name.startswith(f".tmp-step-{step}-")
                          and f.name == file, die)


def kill_before_rename(step):
    return lambda: before(saving, "swap_in", lambda draft, target: target.name == f"step-{step}", die)


def kill_before_step(step):
    return lambda: before(Trainer, "_step", lambda trainer, *rest: trainer.progress.step == step - 1, die)


def stop_in_step(step, number, times=1):
    def harm():
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    return lambda: before(Trainer, "_step", lambda trainer, *rest: trainer.progress.step == step - 1, harm)


def stop_while_writing(saved, step):
    """SIGTERM in `step`, until which the files of step `saved` are not written."""
    due = threading.Event()

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        due.set()

    def harm():
        before(saving, "_write_tensors", lambda file, _: file.parent.name.startswith(f".tmp-step-{saved}-"),
               lambda: due.wait(60))
        before(Trainer, "_step", lambda trainer, *rest: trainer.progress.step == step - 1, stop)

    return harm


def weights(folder):
    return hashlib.sha256((folder / "run/checkpoints/step-8/model.safetensors").read_bytes()).hexdigest()


def scenario(root, name, *harms, **training):
    """One session per harm, then one without: codes, and the run's losses and weights in the end."""
    folder = root / name
    config = tiny_run.config(folder, optimizer={"kind": "muon"}, data={"path": str(root / "text.py"),
                                                                       "cache_dir": str(root / "cache")}, **training)
    (folder / "tiny.yaml").write_text(to_yaml(config))
    sessions = []
    for harm in (*harms, None):
        code = child(folder, harm)
        steps = sorted(checkpoint.step_of(f) for f in checkpoint.step_folders(folder / "run/checkpoints"))
        drafts = [f.name for f in (folder / "run/checkpoints").glob(".tmp-*")]
        sessions.append({"code": code, "steps": steps, "drafts": len(drafts), "out": (folder / "out.txt").read_text()})
    return {"sessions": sessions, "losses": tiny_run.losses(folder / "run"), "weights": weights(folder),
            "lines": len(tiny_run.records(folder / "run"))}


if __name__ == "__main__":
    base = Path(sys.argv[1])
    run.peak_flops = lambda *_: (1e12, "made up")  # each child would measure it
    load_config("train", ["model=quickstart"])  # each child would look for Hydra's plugins
    tiny_run.config(base)
    print(json.dumps({
        "quiet": scenario(base, "quiet"),
        "killed": scenario(base, "killed", kill_before_step(3), kill_in_save(3, "optimizer.safetensors"),
                           kill_before_step(5), kill_before_rename(6), kill_before_step(8), async_checkpoint=False),
        "stopped": scenario(base, "stopped", stop_in_step(2, signal.SIGINT), stop_in_step(5, signal.SIGTERM),
                            stop_in_step(7, signal.SIGINT, 2), async_checkpoint=False),
        "in background": scenario(base, "background", kill_in_save(3, "optimizer.safetensors"),
                                  kill_in_save(6, "model.safetensors"), stop_while_writing(6, 7)),
    }))
