"""Saves and a resume under ZeRO-1, which each of two ranks makes (test_saves.py)."""

import threading
from collections import Counter
from pathlib import Path

import pytest

from hybridlm.checkpoint import folder as files
from hybridlm.checkpoint import saving
from hybridlm.cli import main
from hybridlm.planning.rank_memory import rank_memory
from hybridlm.run_config import load_config
from hybridlm.tensor_storage import StoredTensor
from hybridlm.training.saver import Saver
from hybridlm.training.trainer import Trainer

TINY = ["model=kimi_linear_tiny", "model.num_layers=2", "model.schedule.ratio=1", "model.hidden_size=32",
        "model.vocab_size=257", "data.tokenizer=bytes", "training.batch_size=4", "training.sequence_length=32",
        "training.eval_every=0", "training.eval_batches=1", "training.log_every=1000", "training.checkpoint_every=2",
        "training.keep_checkpoints=9", "training.steps=5", "engine=zero1"]


def train(*words):
    code = main(["train", *TINY, *words])
    assert code == 0, (words, code)


def hold_back(patch, found):
    """What is saved after steps 2 and 4 is written when the next step has been made."""
    made, write, step = threading.Condition(), saving._write_tensors, Trainer._step
    done = [0]

    def late(file, group):
        saved = int(file.parent.name.split("-")[2])
        with made:
            found["held back"] &= saved not in (2, 4) or made.wait_for(lambda: done[0] > saved, timeout=60)
        return write(file, group)

    def counted(trainer, *rest):
        step(trainer, *rest)
        with made:
            done[0] = trainer.progress.step
            made.notify_all()

    patch.setattr(saving, "_write_tensors", late)
    patch.setattr(Trainer, "_step", counted)


def watch_reads(patch, found):
    """Elements of the optimizer's state that this rank reads, by tensor, and the files that it computes hashes of."""
    elements, sha256 = StoredTensor.elements, files._sha256
    found |= {"read": Counter(), "hashed": []}

    def counted(stored, first, count):
        found["read"][stored.name] += count if stored.file.name.startswith("optimizer") else 0
        return elements(stored, first, count)

    def noted(file):
        found["hashed"] += [file.name] if file.parent.name == "step-5" else []
        return sha256(file)

    patch.setattr(StoredTensor, "elements", counted)
    patch.setattr(files, "_sha256", noted)


def note_snapshots(patch, found, config):
    """Bytes of a save that this rank holds, against the estimate."""
    begin = Saver.begin
    found["estimate"] = rank_memory(config, 2).snapshot

    def noted(saver, step, texts, groups, **options):
        found["snapshot"] = sum(tensor.nbytes for group in groups.values() for tensor in group.values())
        return begin(saver, step, texts, groups, **options)

    patch.setattr(Saver, "begin", noted)


def save_and_resume(folder, text):
    """One run after the other: training waits for its saves; a thread writes them; a third goes on from the first's."""
    base = Path(folder)
    data = [f"data.path={text}", f"data.cache_dir={base / 'cache'}"]
    found = {"held back": True}
    train(*data, f"run_dir={base / 'waiting'}", "training.async_checkpoint=false")
    with pytest.MonkeyPatch.context() as patch:
        note_snapshots(patch, found, load_config("train", [*TINY, *data]))
        hold_back(patch, found)
        train(*data, f"run_dir={base / 'beside'}")
        watch_reads(patch, found)
        train(*data, f"run_dir={base / 'waiting'}", "training.steps=6")
    return found
