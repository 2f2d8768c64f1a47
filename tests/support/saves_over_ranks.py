"""What each of two processes runs for test_saves.py: `saves_over_ranks.py FOLDER TEXT`; each writes rank-N.json there.

One `hybridlm train` after the other, under ZeRO-1: training waits for its saves; a thread writes them; a third goes on
from what the first has saved.
"""

import json
import sys
import threading
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

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


def hold_back(found):
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

    saving._write_tensors, Trainer._step = late, counted


def watch_reads(found):
    """Elements of the optimizer's state that this rank reads, by tensor, and the files that it computes hashes of."""
    elements, sha256 = StoredTensor.elements, files._sha256
    found |= {"read": Counter(), "hashed": []}

    def counted(stored, first, count):
        found["read"][stored.name] += count if stored.file.name.startswith("optimizer") else 0
        return elements(stored, first, count)

    def noted(file):
        found["hashed"] += [file.name] if file.parent.name == "step-5" else []
        return sha256(file)

    StoredTensor.elements, files._sha256 = counted, noted


def note_snapshots(found, config):
    """Bytes of a save that this rank holds, against the estimate."""
    begin = Saver.begin
    found["estimate"] = rank_memory(config, 2).snapshot

    def noted(saver, step, texts, groups, **options):
        found["snapshot"] = sum(tensor.nbytes for group in groups.values() for tensor in group.values())
        return begin(saver, step, texts, groups, **options)

    Saver.begin = noted


if __name__ == "__main__":
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    data = [f"data.path={sys.argv[2]}", f"data.cache_dir={base / 'cache'}"]
    found = {"held back": True}
    train(*data, f"run_dir={base / 'waiting'}", "training.async_checkpoint=false")
    rank = dist.get_rank()
    note_snapshots(found, load_config("train", [*TINY, *data]))
    hold_back(found)
    train(*data, f"run_dir={base / 'beside'}")
    watch_reads(found)
    train(*data, f"run_dir={base / 'waiting'}", "training.steps=6")
    (base / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
