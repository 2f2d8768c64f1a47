"""ZeRO: checkpoints that do not know what is divided over how many ranks, bad steps, hangs, and what is refused.

That the losses are those of one process: test_equality.py.
"""

import json
from pathlib import Path

import pytest

from hybridlm import load_config
from hybridlm.cli import main
from hybridlm.planning.rank_memory import rank_memory
from tests.support import train_over_ranks, zero_checks
from tests.support.over_ranks import on_ranks, records, start

pytest.importorskip("deepspeed")

TINY = ["model.hidden_size=32", "model.vocab_size=257", "data.tokenizer=bytes", "training.batch_size=4",
        "training.sequence_length=32", "training.eval_every=0", "training.eval_batches=1", "training.log_every=1000",
        "optimizer.schedule.kind=constant", "optimizer.schedule.warmup=4", "training.keep_checkpoints=9"]
SYSTEMS = {"kimi": ["model=kimi_linear_tiny", "model.num_layers=4"],
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


def train_on(number, folder, *runs):
    """The runs in that many processes, one after the other, all of which must succeed."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    on_ranks(number, train_over_ranks.__file__, listed, folder=folder)


def assert_same(found, wanted, rel=1e-5):
    """Losses, norms and samples of the steps."""
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


def samples(folder):
    """By step, those that all ranks computed together."""
    seen = {}
    for file in folder.glob("samples-*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            seen[row["step"]] = sorted([*seen.get(row["step"], []), *row["samples"]])
    return seen


@pytest.mark.slow
def test_sessions_of_other_engines_and_ranks(words):
    """ZeRO-2 on four ranks, ZeRO-3 on two with all on the host, ddp on two, one process; and a recipe of two stages.

    Each token meets every expert here: where it chooses, one near a tie may choose otherwise on other sums.
    """
    root = words.root
    every = ["model.feed_forward.num_experts_per_tok=8", "training.record_samples=true", *ACCUMULATED]
    assert main(["train", *words("whole", "kimi", *every, steps=12)]) == 0
    assert main(["train", *words("stages", "deepseek", *TWO_STAGES)]) == 0
    train_on(4, root, words("part", "kimi", *every, "engine=zero2", steps=4))
    on_host = ["engine.offload_optimizer=true", "engine.offload_parameters=true"]
    train_on(2, root, words("part", "kimi", *every, *ZERO3, *on_host, steps=8),
             words("part", "kimi", *every, "engine=ddp", steps=10),
             words("stages-zero3", "deepseek", *TWO_STAGES, *ZERO3))
    assert main(["train", *words("part", "kimi", *every, steps=12)]) == 0
    assert_same(root / "part", root / "whole")
    assert samples(root / "part") == samples(root / "whole") == {
        step + 1: list(range(4 * step, 4 * step + 4)) for step in range(12)}
    assert len([*(root / "part").glob("samples-*.jsonl")]) == 4
    assert_same(root / "stages-zero3", root / "stages")
    told = json.loads((root / "stages-zero3" / "deepspeed.json").read_text())
    assert told["zero_optimization"]["stage"] == 3
    assert not {"bf16", "fp16"} & told.keys()


@pytest.mark.slow
def test_engines_on_two_ranks(tmp_path):
    """NaN on one rank, gradients of each loss, types, starved experts and every optimizer; then one rank hangs, and
    each says where it is."""
    codes, errors = start(2, zero_checks.__file__, tmp_path, folder=tmp_path)
    assert all("checked" in error for error in errors), "\n".join(errors)
    assert codes == [1, 1]
    for rank, error in enumerate(errors):
        assert f"rank {rank} of 2: step 7 has stood still for" in error
    assert "in __main__.hang (line" in errors[1]
    assert "hybridlm.distributed" in errors[0]


@pytest.mark.parametrize(("words", "message"), [
    (["engine=zero1", "optimizer=muon", "engine.offload_optimizer=true"],
     "engine.offload_optimizer: does not go with optimizer.kind=muon"),
    (["engine=ddp", "+engine.offload_optimizer=true"],
     "engine.offload_optimizer: unknown key; it is an option of kind 'zero1' and 'zero2' and 'zero3'"),
    (["engine=zero2", "+engine.offload_parameters=true"],
     "engine.offload_parameters: unknown key; it is an option of kind 'zero3'"),
    (["engine=zero3", "engine.bucket_elements=0"], "engine.bucket_elements: must be positive"),
])
def test_refused_before_anything_starts(words, message, tmp_path, capsys):
    assert main(["train", *SYSTEMS["kimi"], "engine.num_processes=2", f"run_dir={tmp_path / 'run'}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_memory_of_a_rank_holds_a_layer_whole():
    config = load_config("train", ["model=deepseek_v32_671b", "engine=zero3", "training.precision=fp32"])
    experts = 4 * 256 * 3 * 7168 * 2048  # bytes; DeepSpeed gathers a module at a time, however large it is
    assert experts < rank_memory(config, 2048).gathered < 1.1 * experts


def test_without_deepspeed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("hybridlm.distributed.rank_environment.find_spec", lambda name: None)
    assert main(["train", *SYSTEMS["kimi"], "engine=zero1", "engine.num_processes=2", f"run_dir={tmp_path}"]) == 2
    assert "pip install 'hybridlm[deepspeed]'" in capsys.readouterr().err
