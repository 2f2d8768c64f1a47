"""Context parallel: the collectives, every mixer over gloo, and whole runs with the losses of one process."""

from importlib.util import find_spec

import pytest

from hybridlm.cli import main
from tests.support.rank_pool import TRAIN
from tests.support.run_records import records

TINY = ["model.hidden_size=32", "model.vocab_size=257", "data.tokenizer=bytes",
        "training.batch_size=4", "training.sequence_length=96", "training.eval_every=0", "training.eval_batches=1",
        "training.log_every=1000", "training.steps=3", "training.precision=fp32"]
# name: words that both runs have, engine of the four ranks, its words. 96 tokens are above the sparse system's top-k of
# 64; a quarter of them, 24, is no multiple of a chunk.
HYBRID = ["model.num_layers=2", "model.schedule.ratio=1"]
RUNS = {
    "kimi_linear_tiny": ([*HYBRID, "training.micro_batch_size=2"], "ddp", ["engine.context_parallel=4"]),
    "qwen3_next_tiny": ([*HYBRID, "training.activation_checkpointing=true"], "ddp", ["engine.context_parallel=2"]),
    "minimax_01_tiny": (HYBRID, "ddp", ["engine.context_parallel=4", "engine.expert_parallel=2"]),
    "deepseek_v32_tiny": (["model.num_layers=2", "training.micro_batch_size=2"],
                          "zero3" if find_spec("deepspeed") else "ddp", ["engine.context_parallel=2"]),
}


@pytest.mark.slow
def test_every_mixer_on_shards_of_rows(four_ranks):
    four_ranks.run("tests.support.shards_over_ranks:check_mixers")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_process(name, four_ranks, data_words, tmp_path):
    """Language model, MTP, balance and indexer losses, gradients, loads, counts of tokens and bytes, validation."""
    both, engine, words = RUNS[name]
    common = [f"model={name}", *TINY, *data_words, *both]
    assert main(["train", *common, f"run_dir={tmp_path / 'one'}"]) == 0
    four_ranks.run(TRAIN, *common, f"engine={engine}", *words, f"run_dir={tmp_path / 'four'}")
    wanted, found = records(tmp_path / "one"), records(tmp_path / "four")
    assert [r["step"] for r in found] == [r["step"] for r in wanted] == [1, 2, 3]
    for a, b in zip(found, wanted, strict=True):
        for key, value in b.items():
            if key in ("total_loss", "grad_norm", "tokens", "samples", "bits_per_byte") or key.startswith(
                    ("loss", "validation", "moe/load")):
                assert a[key] == pytest.approx(value, rel=1e-5, abs=1e-8), (key, a["step"])


@pytest.mark.parametrize(("words", "message"), [
    (["engine.context_parallel=0"], "engine.context_parallel: must be at least 1; got 0"),
    (["engine.context_parallel=3"],
     "sequence_length: must divide into engine.context_parallel equal shards; got 64; expected a multiple of 3"),
    (["engine.context_parallel=4"], "engine.context_parallel: must divide the number of processes; got 4; expected a "
                                     "divisor of 2"),
    (["engine.context_parallel=2", "model.mixers.full.num_heads=3", "model.mixers.full.num_kv_heads=3"],
     "model.mixers.full.num_heads: must divide among the processes that share a row; got 3; expected a multiple of 2"),
    (["engine.context_parallel=2", "engine.num_processes=6", "training.batch_size=4"],
     "training.batch_size: must be a multiple of the number of processes over engine.context_parallel (6 / 2)"),
    (["engine.context_parallel=2", "model.mixers.gdn.conv_size=40", "training.sequence_length=64"],
     "conv_size: reaches over more than one shard of a split row; got 40; expected at most 33 taps"),
])
def test_refused_before_anything_starts(words, message, tmp_path, capsys):
    base = ["model=qwen3_next_tiny", "engine=ddp", "engine.num_processes=2", "training.sequence_length=64"]
    assert main(["train", *base, *words, f"run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()
