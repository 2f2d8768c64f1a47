"""ZeRO: the losses of one process, whatever is divided over how many ranks, and checkpoints that do not know of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import train_over_ranks

from hybridlm.cli import main
from hybridlm.distributed.launch import free_port

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = ["model.hidden_size=32", "model.vocab_size=257", "data.tokenizer=bytes", "training.batch_size=4",
        "training.sequence_length=32", "training.eval_every=0", "training.eval_batches=1", "training.log_every=1000",
        "optimizer.schedule.kind=constant", "optimizer.schedule.warmup=4", "training.keep_checkpoints=9"]
SYSTEMS = {"kimi": ["model=kimi_linear_tiny", "model.num_layers=4"],
           "qwen": ["model=qwen3_next_tiny", "model.num_layers=4"],
           "minimax": ["model=minimax_01_tiny", "model.num_layers=8"],
           "deepseek": ["model=deepseek_v32_tiny", "model.num_layers=2", "training.sequence_length=96"]}  # top-k 64
ZERO3 = ["engine=zero3", "engine.persistence_threshold=0"]  # tiny weights would all stay whole
ACCUMULATED = ["training.micro_batch_size=1"]
# The indexer alone, then everything: parameters that began to train at different steps.
TWO_STAGES = ["recipe=dsa_scratch", "recipe.stages.0.steps=4", "recipe.stages.1.steps=4",
              "recipe.stages.0.trainable=['*.indexer.*']", "recipe.stages.1.eval_recall=false"]
STEPS = 20


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Words of a run of `system` in a folder of that name."""
    root = tmp_path_factory.mktemp("zero")
    text = root / "text.py"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8") * 3, encoding="utf-8")

    def make(name, system, *more, steps=STEPS):
        model, *rest = SYSTEMS[system]
        return [model, *TINY, *rest, f"data.path={text}", f"data.cache_dir={root / 'cache'}", f"training.steps={steps}",
                f"run_dir={root / name}", *more]

    make.root = root
    return make


def on_ranks(number, folder, *runs):
    """The runs in that many processes, one after the other, all of which must succeed."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(number),
              "LOCAL_WORLD_SIZE": str(number)}
    ranks = [subprocess.Popen([sys.executable, train_over_ranks.__file__, str(listed)], text=True,
                              stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(number)]
    try:
        errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * number, "\n".join(errors)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(found, wanted, rel=1e-5):
    """Losses, norms and samples of the steps; the reference may have gone further."""
    found, wanted = records(found), records(wanted)
    assert [r["step"] for r in found] == [r["step"] for r in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a["samples"] == b["samples"]
        for key in ("loss", "total_loss", "grad_norm", "lr", "loss/mtp", "loss/balance"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=rel), (key, a["step"])
        if "loss/indexer_kl" in b:
            assert a["loss/indexer_kl"] == pytest.approx(b["loss/indexer_kl"], rel=1e-4, abs=1e-7)
    assert found[-1]["validation_loss"] == pytest.approx(wanted[-1]["validation_loss"], rel=rel)


@pytest.fixture(scope="module")
def alone(words):
    """One process: a run of each system."""
    for system in SYSTEMS:
        assert main(["train", *words(f"{system}-alone", system)]) == 0
    assert main(["train", *words("stages-alone", "deepseek", *TWO_STAGES)]) == 0
    return words.root


def test_two_ranks_train_as_one(words, alone):
    """Every stage with every system: MoE, MTP and indexer losses, accumulation, and a checkpoint in mid-run."""
    runs = [words(f"{system}-{name}", system, *engine)
            for system in SYSTEMS
            for name, engine in (("zero1", ["engine=zero1"]), ("zero2", ["engine=zero2", *ACCUMULATED]),
                                 ("zero3", [*ZERO3, *ACCUMULATED, "training.activation_checkpointing=true"]))]
    runs.append(words("stages-zero3", "deepseek", *TWO_STAGES, *ZERO3))
    runs.append(words("part", "kimi", *ZERO3, "engine.offload_optimizer=true", "engine.offload_parameters=true",
                      steps=10))
    on_ranks(2, alone, *runs)
    for system in SYSTEMS:
        for stage in ("zero1", "zero2", "zero3"):
            assert_same(alone / f"{system}-{stage}", alone / f"{system}-alone")
    assert_same(alone / "stages-zero3", alone / "stages-alone")
    told = json.loads((alone / "kimi-zero3" / "deepspeed.json").read_text())
    assert told["zero_optimization"]["stage"] == 3
    assert not {"bf16", "fp16"} & told.keys()
    # The first half under ZeRO-3 with all on the host; the second in one process without ZeRO.
    assert main(["train", *words("part", "kimi")]) == 0
    assert_same(alone / "part", alone / "kimi-alone")
