"""Two ranks that meet what goes wrong between processes. Prints one JSON object: case -> what each rank did.

    python faults_driver.py FOLDER

Ranks are forks of this process, started as a cluster's launcher does: by variables, with nobody to end the others.
"""

import argparse
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path

import torch

from hybridlm.checkpoint import folder, saving
from hybridlm.distributed.engine import Contribution
from hybridlm.distributed.launch import free_port
from hybridlm.training import run, trainer
from scripts.dev.chaos_run import Forked

WORDS = ["model=kimi_linear_tiny", "model.num_layers=2", "model.schedule.ratio=1", "model.hidden_size=32",
         "model.vocab_size=257", "data.tokenizer=bytes", f"data.path={argparse.__file__}", "training.batch_size=4",
         "training.sequence_length=32", "training.eval_batches=1", "training.steps=6", "training.checkpoint_every=2",
         "training.keep_checkpoints=9", "engine=ddp", "engine.timeout=60"]


def ranks(base, words, harms=(None, None), own=((), ()), which=(0, 1), port=None):
    """Exit codes, what was printed, and seconds, of ranks that are harmed (a function called in them) or that have
    `own` words."""
    port = str(port or free_port())
    files = [base / f"rank-{rank}.txt" for rank in which]
    begin = time.monotonic()
    started = []
    for rank, file in zip(which, files, strict=True):
        file.unlink(missing_ok=True)
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": port}
        started.append(Forked(["train", *WORDS, f"data.cache_dir={base / 'cache'}", *words, *own[rank]], env=env,
                              preexec_fn=harms[rank], output=file))
    while any(process.poll() is None for process in started):
        if time.monotonic() - begin > 120:
            for process in started:
                process.send_signal(9)
        time.sleep(0.02)
    return {"codes": [process.returncode for process in started], "seconds": time.monotonic() - begin,
            "said": [file.read_text() for file in files]}


def poison_step(step):
    """The loss of this rank's part of a step is not a number."""
    original, calls = trainer.step_loss, []

    def loss_function(*args):
        calls.append(1)
        found = original(*args)
        if len(calls) != step:
            return found

        def poisoned(model, part):
            contribution = found(model, part)
            return Contribution(contribution.loss * float("nan"), contribution.values)

        return poisoned

    trainer.step_loss = loss_function


def refuse_disk(step):
    """This rank's disk takes no file of a checkpoint."""
    original = saving._write_tensors

    def write(file, tensors):
        if f"step-{step}-" in file.parent.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(file, tensors)

    saving._write_tensors = write


def other_torch():
    real = run.versions
    run.versions = lambda: real() | {"torch": "1.0"}


def older_format():
    folder.FORMAT_VERSION = 0


def harm_one():
    poison_step(3)
    refuse_disk(2)


def damage_shard(base):
    file, = (base / "cache/data").glob("*/train-*.bin")
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    times = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the disk has done it, nobody has written
    return str(file)


def main(base):
    torch.set_num_threads(1)
    run_folder = base / "run"
    here = [f"run_dir={run_folder}"]
    found = {"one is harmed": ranks(base, here, (None, harm_one))}
    found["one is harmed"]["checkpoints"] = sorted(f.name for f in (run_folder / "checkpoints").iterdir())
    found["one is harmed"]["records"] = [json.loads(line) for line in
                                         (run_folder / "metrics.jsonl").read_text().splitlines()]
    found["other architecture"] = ranks(base, [*here, "model.schedule.ratio=0"])
    found["newer checkpoint"] = ranks(base, here, (older_format, older_format))
    fresh = [f"run_dir={base / 'fresh'}"]
    found["other versions"] = ranks(base, fresh, (None, other_torch))
    found["other configs"] = ranks(base, fresh, own=((), ("training.steps=9",)))
    soon = [*fresh, "engine.timeout=2"]
    found["first absent"] = ranks(base, soon, which=(1,))
    found["second absent"] = ranks(base, soon, which=(0,))
    with socket.create_server(("0.0.0.0", 0)) as other:
        found["port taken"] = ranks(base, soon, port=other.getsockname()[1])
    file = damage_shard(base)
    found["damaged shard"] = ranks(base, fresh) | {"file": file}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
