"""Rows split over ranks: the collectives, every mixer over gloo, and whole runs with the losses of one process."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from hybridlm.cli import main
from tests.support import shards_over_ranks
from tests.support.over_ranks import on_ranks, records

TINY = ["model.hidden_size=32", "model.vocab_size=257", "data.tokenizer=bytes",
        "training.batch_size=4", "training.sequence_length=96", "training.eval_every=0", "training.eval_batches=1",
        "training.log_every=1000", "training.steps=3", "training.precision=fp32"]
# name: words that both runs have, engine of the four ranks, its words. 96 tokens are above the sparse system's top-k of
# 64; a quarter of them, 24, is no multiple of a chunk.
RUNS = {
    "kimi_linear_tiny": (["model.num_layers=4", "training.micro_batch_size=2"], "ddp", ["engine.context_parallel=4"]),
    "qwen3_next_tiny": (["model.num_layers=4", "training.activation_checkpointing=true"], "ddp",
                        ["engine.context_parallel=2"]),
    "minimax_01_tiny": (["model.num_layers=8"], "ddp", ["engine.context_parallel=4", "engine.expert_parallel=2"]),
    "deepseek_v32_tiny": (["model.num_layers=3", "training.micro_batch_size=2"],
                          "zero3" if find_spec("deepspeed") else "ddp", ["engine.context_parallel=2"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each system's records on one process and on four."""
    folder = tmp_path_factory.mktemp("sequences")
    text = folder / "text.py"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8") * 3, encoding="utf-8")
    data = [f"data.path={text}", f"data.cache_dir={folder / 'cache'}"]
    words = {name: [f"model={name}", *TINY, *data, *both] for name, (both, *_) in RUNS.items()}
    for name in RUNS:
        assert main(["train", *words[name], f"run_dir={folder / name}"]) == 0
    (folder / "runs.json").write_text(json.dumps([
        [*words[name], f"engine={engine}", *ranks, f"run_dir={folder / f'{name}-4'}"]
        for name, (_, engine, ranks) in RUNS.items()]))
    on_ranks(4, shards_over_ranks.__file__, folder, folder=folder)
    return {name: [records(folder / f"{name}{end}") for end in ("", "-4")] for name in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_process(runs, name):
    """Language model, MTP, balance and indexer losses, gradients, loads, counts of tokens and bytes, validation."""
    wanted, found = runs[name]
    assert [r["step"] for r in found] == [r["step"] for r in wanted] == [1, 2, 3]
    for a, b in zip(found, wanted, strict=True):
        for key, value in b.items():
            if key in ("total_loss", "grad_norm", "tokens", "samples", "bits_per_byte") or key.startswith(
                    ("loss", "validation", "moe/load")):
                assert a[key] == pytest.approx(value, rel=1e-5, abs=1e-8), (key, a["step"])


@pytest.mark.parametrize(("words", "message"), [
    (["engine.context_parallel=0"], "engine.context_parallel: must be at least 1; got 0"),
    (["engine.context_parallel=3"],
     "sequence_length: must divide into engine.context_parallel equal pieces; got 64; expected a multiple of 3"),
    (["engine.context_parallel=4"], "engine.context_parallel: must divide the number of processes; got 4; expected a "
                                     "divisor of 2"),
    (["engine.context_parallel=2", "model.mixers.full.num_heads=3", "model.mixers.full.num_kv_heads=3"],
     "model.mixers.full.num_heads: must divide among the processes that share a row; got 3; expected a multiple of 2"),
    (["engine.context_parallel=2", "engine.num_processes=6", "training.batch_size=4"],
     "training.batch_size: must be a multiple of the number of processes over engine.context_parallel (6 / 2)"),
    (["engine.context_parallel=2", "model.mixers.gdn.conv_size=40", "training.sequence_length=64"],
     "conv_size: reaches over more than one piece of a split row; got 40; expected at most 33 taps"),
])
def test_refused_before_anything_starts(words, message, tmp_path, capsys):
    base = ["model=qwen3_next_tiny", "engine=ddp", "engine.num_processes=2", "training.sequence_length=64"]
    assert main(["train", *base, *words, f"run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()
