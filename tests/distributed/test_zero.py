"""ZeRO: checkpoints that do not know how many ranks wrote them, bad steps, hangs, and what is refused.

That the losses are those of one process: test_equality.py.
"""

import json

import pytest

from hybridlm import load_config
from hybridlm.cli import main
from hybridlm.planning.rank_memory import rank_memory
from tests.support.rank_pool import TRAIN
from tests.support.run_records import records

pytest.importorskip("deepspeed")

TINY = ["model.hidden_size=32", "model.vocab_size=257", "data.tokenizer=bytes", "training.batch_size=4",
        "training.sequence_length=32", "training.eval_every=0", "training.eval_batches=1", "training.log_every=1000",
        "optimizer.schedule.kind=constant", "optimizer.schedule.warmup=2", "training.keep_checkpoints=9"]
SYSTEMS = {"kimi": ["model=kimi_linear_tiny", "model.num_layers=2", "model.schedule.ratio=1"],
           "deepseek": ["model=deepseek_v32_tiny", "model.num_layers=2", "training.sequence_length=96"]}  # top-k 64
ZERO3 = ["engine=zero3", "engine.persistence_threshold=0"]  # tiny weights would all stay whole
ACCUMULATED = ["training.micro_batch_size=1"]
# The indexer alone, then everything: parameters that began to train at different steps.
TWO_STAGES = ["recipe=dsa_scratch", "recipe.stages.0.steps=2", "recipe.stages.1.steps=2",
              "recipe.stages.0.trainable=['*.indexer.*']", "recipe.stages.1.eval_recall=false"]


@pytest.fixture(scope="module")
def words(tmp_path_factory, data_words):
    """Words of a run of `system` in a folder of that name."""
    root = tmp_path_factory.mktemp("zero")

    def make(name, system, *more):
        model, *rest = SYSTEMS[system]
        return [model, *TINY, *rest, *data_words, f"run_dir={root / name}", *more]

    make.root = root
    return make


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
def test_sessions_of_other_engines_and_ranks(words, two_ranks, four_ranks):
    """ZeRO-2 on four ranks, ZeRO-3 on two with all on the host, ddp on two, one process.

    Each token meets every expert here: where it chooses, one near a tie may choose otherwise on other sums.
    """
    root = words.root
    every = ["model.feed_forward.num_experts_per_tok=8", "training.record_samples=true", *ACCUMULATED]
    assert main(["train", *words("one", "kimi", *every, "training.steps=8")]) == 0
    four_ranks.run(TRAIN, *words("sessions", "kimi", *every, "engine=zero2", "training.steps=2"))
    on_host = ["engine.offload_optimizer=true", "engine.offload_parameters=true"]
    two_ranks.run(TRAIN, *words("sessions", "kimi", *every, *ZERO3, *on_host, "training.steps=4"))
    two_ranks.run(TRAIN, *words("sessions", "kimi", *every, "engine=ddp", "training.steps=6"))
    assert main(["train", *words("sessions", "kimi", *every, "training.steps=8")]) == 0
    assert_same(root / "sessions", root / "one")
    assert samples(root / "sessions") == samples(root / "one") == {
        step + 1: list(range(4 * step, 4 * step + 4)) for step in range(8)}
    assert len([*(root / "sessions").glob("samples-*.jsonl")]) == 4


@pytest.mark.slow
def test_a_branch_under_every_engine(words, two_ranks):
    """Each engine goes on from the checkpoint of one process with another rate, batch and optimizer option."""
    root = words.root
    every = ["model.feed_forward.num_experts_per_tok=8", "training.checkpoint_every=2", *ACCUMULATED]
    assert main(["train", *words("trunk", "kimi", *every, "training.steps=4")]) == 0
    branch = [f"branch_from={root}/trunk/checkpoints/step-2", "optimizer.lr=5e-4", "optimizer.betas=[0.8,0.9]",
              "training.batch_size=2"]
    assert main(["train", *branch, f"run_dir={root}/branch"]) == 0
    assert [(r["step"], r["samples"], r["lr"]) for r in records(root / "branch")] == [(3, 10, 5e-4), (4, 12, 5e-4)]
    for name, engine in (("ddp", ["engine=ddp"]), ("zero1", ["engine=zero1"]), ("zero3", ZERO3)):
        two_ranks.run(TRAIN, *branch, *engine, f"run_dir={root}/branch-{name}")
        assert_same(root / f"branch-{name}", root / "branch")
        lineage = json.loads((root / f"branch-{name}" / "lineage.json").read_text())
        assert lineage["step"] == 2
        assert {"key": "optimizer.lr", "old": 1e-3, "new": 5e-4} in lineage["changes"]


@pytest.mark.slow
def test_a_recipe_of_two_stages(words, two_ranks):
    """Parameters that began to train at different steps; DeepSpeed is told its stage and no precision of its own."""
    root = words.root
    assert main(["train", *words("stages", "deepseek", *TWO_STAGES)]) == 0
    two_ranks.run(TRAIN, *words("stages-zero3", "deepseek", *TWO_STAGES, *ZERO3))
    assert_same(root / "stages-zero3", root / "stages")
    told = json.loads((root / "stages-zero3" / "deepspeed.json").read_text())
    assert told["zero_optimization"]["stage"] == 3
    assert not {"bf16", "fp16"} & told.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("check", "arguments"), [
    ("check_nan_on_one_rank", ["zero1"]), ("check_nan_on_one_rank", ["zero2"]), ("check_nan_on_one_rank", ["zero3"]),
    ("check_buckets_of_ddp", []),
    ("check_gradients_of_one_loss", ["ddp", "balance"]), ("check_gradients_of_one_loss", ["ddp", "indexer_kl"]),
    ("check_gradients_of_one_loss", ["zero1", "balance"]), ("check_gradients_of_one_loss", ["zero2", "indexer_kl"]),
    ("check_gradients_of_one_loss", ["zero3", "balance"]), ("check_gradients_of_one_loss", ["zero3", "indexer_kl"]),
    ("check_build", []), ("check_dtypes", ["zero2"]), ("check_bf16", []), ("check_the_shell_is_ignored", []),
    ("check_starved_experts", []), ("check_matrix_steps", ["muon"]), ("check_matrix_steps", ["adafactor"])])
def test_engines_on_two_ranks(two_ranks, check, arguments):
    two_ranks.run(f"tests.support.zero_checks:{check}", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lion", "adafactor", "muon"])
def test_a_step_of_an_optimizer_under_every_engine(two_ranks, tmp_path, optimizer):
    two_ranks.run("tests.support.zero_checks:check_step_of_every_engine", optimizer, str(tmp_path))


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_and_each_says_where_it_is(two_ranks):
    codes, errors = two_ranks.run_to_the_end("tests.support.zero_checks:hang")
    assert codes == [1, 1]
    for rank, error in enumerate(errors):
        assert f"rank {rank} of 2: step 7 has stood still for" in error
    assert "in tests.support.zero_checks.hang (line" in errors[1]
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


def test_memory_of_a_rank_includes_a_complete_layer():
    config = load_config("train", ["model=deepseek_v32_671b", "engine=zero3", "training.precision=fp32"])
    experts = 4 * 256 * 3 * 7168 * 2048  # bytes; DeepSpeed gathers a module at a time, however large it is
    assert experts < rank_memory(config, 2048).gathered < 1.1 * experts


def test_without_deepspeed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("hybridlm.planning.process_count.find_spec", lambda name: None)
    assert main(["train", *SYSTEMS["kimi"], "engine=zero1", "engine.num_processes=2", f"run_dir={tmp_path}"]) == 2
    assert "pip install 'hybridlm[deepspeed]'" in capsys.readouterr().err
