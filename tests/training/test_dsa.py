"""Converting a dense checkpoint into sparse attention: what trains, what is saved, what goes on, what is refused."""

import json
import logging
import re

import pytest
import torch

from hybridlm import checkpoint
from hybridlm.cli import main
from hybridlm.config.serialization import to_dict, to_yaml
from hybridlm.errors import ConfigError
from hybridlm.model import generate
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.mixers import AttentionConfig, IndexerConfig, MLAConfig
from hybridlm.model.model import build_model
from hybridlm.model.rope import RopeConfig
from hybridlm.optimizers import build_optimizer
from hybridlm.run_config import load_config
from hybridlm.training import train
from hybridlm.training.stages import check_trained
from tests.support import tiny_run
from tests.support.tiny_run import weights

STEPS = (3, 4)  # of the two stages


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run of a linear and a full layer, with experts and MTP; its data is prepared."""
    folder = tmp_path_factory.mktemp("dense")
    return train(tiny_run.config(folder, steps=2, eval_every=0)).run_dir


def settings(dense, run_dir, *more):
    return load_config("train", [
        "recipe=dsa_tiny", f"init_from={dense}", f"run_dir={run_dir}", f"data.path={dense.parent}/text.py",
        f"data.cache_dir={dense.parent}/cache", "data.validation_fraction=0.1", "recipe.indexer.topk=6",
        "recipe.indexer.num_heads=4", "recipe.indexer.head_dim=16",
        *(f"recipe.stages.{i}.{key}={value}" for i in (0, 1) for key, value in {
            "steps": STEPS[i], "sequence_length": 32, "batch_size": 4, "lr": "1e-2"}.items()),
        "training.eval_batches=1", "training.eval_every=0", "training.checkpoint_every=100",
        "training.keep_checkpoints=10", "optimizer.schedule.kind=constant", "optimizer.schedule.warmup=0", *more])


@pytest.fixture(scope="module")
def done(dense, tmp_path_factory):
    """A whole conversion; tests leave it as it is."""
    return train(settings(dense, tmp_path_factory.mktemp("sparse") / "run"))


def test_the_warm_up_trains_the_indexers_and_changes_no_other_bit(dense, done):
    before, after = weights(dense), weights(done.run_dir / "checkpoints" / "step-3")
    fresh = set(after) - set(before)
    assert fresh == {f"{prefix}.mixer.indexer.{name}" for prefix in ("layers.1", "mtp.0.block") for name in (
        "q_proj.weight", "k_proj.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")}
    assert all(torch.equal(after[name], before[name]) for name in before)
    started = build_model(load_config(str(done.run_dir / "config.yaml")))
    assert all(not torch.equal(after[name], started.get_parameter(name)) for name in fresh)


def test_the_optimizer_of_the_warm_up_holds_the_indexers_alone(done):
    folder = done.run_dir / "checkpoints" / "step-3"
    names = {key.split("/", 1)[1] for key in weights(folder, "optimizer")}
    assert names == {name for name in weights(folder) if ".indexer." in name}


def test_the_trained_parameters_are_printed(done):
    text = (done.run_dir / "log.txt").read_text()
    assert "fresh indexers in layers.1, mtp.0.block" in text
    assert "stage indexer_warmup: 3 steps, 10 of " in text
    assert "trained: layers.1.mixer.indexer.q_proj.weight, layers.1.mixer.indexer.k_proj.weight, " in text


def test_the_sparse_stage_trains_everything(done):
    before, after = weights(done.run_dir / "checkpoints" / "step-3"), weights(done.run_dir)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == set()


def test_checkpoints_say_how_their_stage_attends(done):
    warm, sparse = (checkpoint.load_checkpoint(done.run_dir / "checkpoints" / f"step-{n}") for n in (3, 7))
    for model, mode in ((warm, "dense"), (sparse, "sparse")):
        assert model.layers[1].mixer.attention_mode == mode
        assert model.config.mixers["full"].indexer.topk == 6
    assert len(list(generate(sparse, torch.arange(20), 3))) == 3


def test_records_tell_what_the_indexers_do(done):
    rows = tiny_run.records(done.run_dir)
    assert [row["stage"] for row in rows] == ["indexer_warmup"] * 3 + ["sparse"] * 4
    for row in rows:
        warm = row["stage"] == "indexer_warmup"
        assert row["total_loss"] == (pytest.approx(row["loss/indexer_kl"]) if warm else pytest.approx(
            row["loss/lm"] + 0.3 * row["loss/mtp"] + 0.01 * row["loss/balance"] + row["loss/indexer_kl"]))
        assert (row["loss"] is None) == ("loss/lm" not in row) == warm  # the warm-up computes no logits
        assert row["dsa/indexer_kl"] == pytest.approx((row["dsa/indexer_kl/1"] + row["dsa/indexer_kl/mtp1"]) / 2)
        assert not any(key.startswith("dsa/") and key.endswith("/0") for key in row)  # a linear layer
        assert 0 < row["dsa/indexer_entropy"] < 3.5
        assert ("dsa/indexer_recall" in row) == warm
    assert rows[2]["loss/indexer_kl"] != rows[0]["loss/indexer_kl"]
    for row in (rows[2], rows[6]):
        assert 0 < row["validation_dsa/indexer_recall/1"] < 1
        assert 0 < row["validation_dsa/indexer_agreement"] < 1


def test_eval_tells_what_the_indexers_find(dense, done, capsys):
    words = ["eval", str(done.run_dir), "--indexers", "--only", "perplexity", "--windows", "2"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["indexers"]
    assert [row["layer"] for row in found["layers"]] == [1]
    assert 0 < found["mean"]["recall"] <= found["mean"]["attainable"] <= 1
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "share of dense attention on 6 keys" in out
    assert re.search(rf"all +{found['mean']['kl']:.3f} +{found['mean']['recall']:.3f} ", out)
    assert "6-11 before" in out
    assert main([*words, "--sequence-length", "4"]) == 0
    assert "no query sees more keys than are selected" in capsys.readouterr().out
    assert main(["eval", str(dense), "--indexers", "--windows", "1", "--only", "perplexity"]) == 2
    assert "--indexers: the model has no indexer" in capsys.readouterr().err
    assert main(["eval", str(done.run_dir), "--indexers", "--only", "decode"]) == 2
    assert "--indexers: reads text" in capsys.readouterr().err


def test_recall_in_the_sparse_stage_on_demand_changes_nothing_else(dense, done, tmp_path):
    result = train(settings(dense, tmp_path / "run", "recipe.stages.1.recall_every=2"))
    rows, before = tiny_run.records(result.run_dir), tiny_run.records(done.run_dir)
    assert ["dsa/indexer_recall/1" in row for row in rows] == [True] * 3 + [False, True] * 2
    for name in ("recall", "agreement", "attainable"):
        assert all(0 < rows[i][f"dsa/indexer_{name}"] <= 1 for i in (4, 6))
    assert [row["total_loss"] for row in rows] == [row["total_loss"] for row in before]


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_stopped_in_either_stage_goes_on_there(dense, done, step, tmp_path, monkeypatch):
    tiny_run.check_resume(monkeypatch, lambda: settings(dense, tmp_path / "run"), step, done.run_dir)


def test_recall_is_measured_on_demand(dense, tmp_path):
    without = ("recipe.stages.0.eval_recall=false", "recipe.stages.1.eval_recall=false")
    first = train(settings(dense, tmp_path / "run", *without, "recipe.stages.0.steps=1", "recipe.stages.1.steps=1"))
    assert "validation_dsa/indexer_recall" not in first.validation
    again = train(settings(dense, tmp_path / "run", "recipe.stages.0.steps=1", "recipe.stages.1.steps=1"))
    assert 0 < again.validation["validation_dsa/indexer_recall"] < 1
    assert again.validation["validation_loss"] == first.validation["validation_loss"]


def test_the_saved_config_is_the_same_run_again(done):
    again = load_config(str(done.run_dir / "config.yaml"))
    saved = (done.run_dir / "config.yaml").read_text()
    assert to_yaml(again) == saved
    assert again.model.name == "tiny_dsa"


def test_the_second_stage_alone_needs_a_trained_indexer(dense, done, tmp_path, caplog):
    alone = "recipe.stages=[{name: sparse, attention_mode: sparse, steps: 1, sequence_length: 32, batch_size: 2}]"
    with pytest.raises(ConfigError, match=r"recipe.stages.0.attention_mode: would select keys by an indexer that "
                                          "nothing has trained"):
        load_config("train", ["recipe=dsa_tiny", f"init_from={dense}", alone])
    warm = done.run_dir / "checkpoints" / "step-3"
    config = load_config("train", [
        "recipe=dsa_tiny", f"init_from={warm}", alone, f"run_dir={tmp_path}/run", f"data.path={dense.parent}/text.py",
        f"data.cache_dir={dense.parent}/cache", "data.validation_fraction=0.1"])
    assert config.model.mixers["full"].indexer.num_heads == 4  # its own, not the recipe's
    with caplog.at_level(logging.WARNING, "hybridlm"):
        train(config)
    assert "has indexers in these layers already: layers.1; they are trained further as they are, with top-k 6" in (
        caplog.text)
    assert "recipe.indexer changes nothing (recipe.stages.N.topk=32 sets its top-k for a stage)" in caplog.text
    assert checkpoint.load_checkpoint(tmp_path / "run").layers[1].mixer.attention_mode == "sparse"


def test_a_top_k_above_the_length_is_worth_a_warning(dense, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hybridlm"):
        train(settings(dense, tmp_path / "run", "recipe.stages.0.steps=1", "recipe.stages.1.steps=1",
                       "recipe.stages.1.topk=32"))
    assert "stage sparse: top-k 32 is not below the length of 32 tokens" in caplog.text
    assert checkpoint.read_model_config(checkpoint.resolve(tmp_path / "run")).mixers["full"].indexer.topk == 32


@pytest.mark.parametrize(("overrides", "text"), [
    (["init_from=null"], "init_from: is missing; expected the checkpoint that recipe=dsa_tiny converts"),
    (["init_from=/nowhere"], "init_from: no such checkpoint; got '/nowhere'"),
    (["model=quickstart"], "model: comes from the checkpoint with recipe=dsa_tiny; got 'quickstart'"),
    (["recipe.layers=[0]"],
     "recipe.layers: names a layer that is not full attention; got '0 (linear)'; expected some of [1]"),
    (["recipe.layers=[7]"], "recipe.layers: names a layer the model does not have; got 7; expected 0 to 1"),
    (["recipe.layers=[]"], "recipe.layers: names no layer"),
    (["recipe.indexer.tpok=4"], "recipe.indexer.tpok: unknown key; did you mean 'topk'"),
    (["recipe.indexer.share=true"], "recipe.indexer.share: is how many converted layers"),
    (["recipe.indexer.share=0"], "recipe.indexer.share: is how many converted layers"),
    (["recipe.indexer.pool=5"], "recipe.indexer.topk: must be whole pools"),
    (["recipe.indexer.topk=0"], "recipe.indexer.topk: must be positive; got 0"),
    (["recipe.stages.0.loss_weights.ml=0"], "loss_weights.ml: is not a loss; expected one of lm, mtp"),
])
def test_mistakes_are_one_line(dense, overrides, text):
    with pytest.raises(ConfigError, match=re.escape(text)) as error:
        load_config("train", ["recipe=dsa_tiny", f"init_from={dense}", *overrides])
    assert "\n" not in str(error.value)


def test_stages_that_speak_of_selection_need_a_model_that_selects():
    with pytest.raises(ConfigError, match=r"recipe.stages.0.attention_mode: needs a model with sparse attention"):
        load_config("train", ["model=quickstart", "recipe=dsa_scratch"])
    with pytest.raises(ConfigError, match=r"recipe.layers: needs an indexer"):
        load_config("train", ["recipe.layers=[1]"])


def test_a_model_without_full_layers_is_refused(tmp_path):
    config = tiny_run.config(tmp_path, model_options={
        "schedule": ScheduleConfig(pattern=["linear", "linear"])}, steps=1, eval_every=0, eval_batches=0)
    run = train(config).run_dir
    with pytest.raises(ConfigError, match="init_from: holds a model without full attention: there is nothing to "):
        load_config("train", ["recipe=dsa_tiny", f"init_from={run}"])


def test_the_audit_names_what_should_not_train():
    model = build_model(tiny_run.model())
    names = [name for name, _ in model.named_parameters()]
    optimizers = build_optimizer(model, load_config("train").optimizer)
    check_trained(model, names, optimizers)
    with pytest.raises(RuntimeError, match=r"'embed.weight' should not be among them"):
        check_trained(model, [name for name in names if name != "embed.weight"], optimizers)
    model.embed.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'embed.weight' is not among them"):
        check_trained(model, names, optimizers)


def test_sparse_attention_from_scratch(dense, tmp_path):
    sizes = ["num_layers=2", "hidden_size=32", "schedule.ratio=1", "mixers.dsa.indexer.topk=6", "max_position=64",
             "feed_forward={kind: dense, intermediate_size: 32}"]
    result = train(load_config("train", [
        "model=kda_dsa_tiny", "recipe=dsa_scratch", f"run_dir={tmp_path}/run", "recipe.stages.0.steps=2",
        "training.steps=2", "training.sequence_length=32", "training.batch_size=2", "training.eval_batches=1",
        f"data.path={dense.parent}/text.py", f"data.cache_dir={dense.parent}/cache", "data.validation_fraction=0.1",
        *(f"model.{size}" for size in sizes)]))
    rows = tiny_run.records(result.run_dir)
    assert [row["stage"] for row in rows] == ["dense", "dense", "sparse", "sparse"]
    assert ["dsa/indexer_recall" in row for row in rows] == [True, True, False, False]
    assert 0 < result.validation["validation_dsa/indexer_recall"] < 1
    assert checkpoint.load_checkpoint(result.run_dir).layers[1].mixer.attention_mode == "sparse"


def config_alone(folder, model):
    """A checkpoint that holds a model's config and nothing to load."""
    texts = checkpoint.model_texts({"model": to_dict(model)}, model, None)
    return checkpoint.write(folder, 0, texts, {"model": {"none": torch.zeros(1)}})


@pytest.mark.parametrize("preset", ["dsa", "dsa_small", "dsa_tiny"])
@pytest.mark.parametrize(("mixer", "sizes"), [
    (AttentionConfig(num_heads=2, head_dim=16), (16, 16)),
    (AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=64), (16, 64)),
    (AttentionConfig(num_heads=64, num_kv_heads=8, head_dim=256), (32, 256)),
    (AttentionConfig(num_heads=16, head_dim=256, rope=RopeConfig(partial_rotary_factor=0.25)), (16, 128)),
    (MLAConfig(num_heads=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=16), (64, 128)),
    (MLAConfig(num_heads=4, qk_nope_head_dim=16, qk_rope_head_dim=24, v_head_dim=16, kv_lora_rank=16), (16, 24)),
])
def test_the_presets_fit_any_model(tmp_path, preset, mixer, sizes):
    folder = config_alone(tmp_path, tiny_run.model(mixers={"full": mixer}, max_position=131072,
                                                   schedule=ScheduleConfig(pattern=["full"])))
    indexer = load_config("train", [f"recipe={preset}", f"init_from={folder}"]).model.mixers["full"].indexer
    assert (indexer.num_heads, indexer.head_dim) == sizes
    with pytest.raises(ConfigError, match=r"recipe\.indexer\.rope_dim: does not fit the index heads"):
        load_config("train", [f"recipe={preset}", f"init_from={folder}", "recipe.indexer.head_dim=4"])


def test_two_top_k_in_one_model_are_refused(tmp_path):
    full = AttentionConfig(num_heads=2, head_dim=16)
    sparse = full.with_indexer(IndexerConfig(num_heads=2, head_dim=16, topk=48))
    folder = config_alone(tmp_path, tiny_run.model(
        mixers={"full": full, "sparse": sparse}, max_position=256, schedule=ScheduleConfig(pattern=["sparse", "full"])))
    start = ["recipe=dsa_tiny", f"init_from={folder}"]
    with pytest.raises(ConfigError, match=r"recipe\.indexer\.topk: is not that of the indexer which layer 0 has "
                                          r"already; got 32; expected 48, as there; recipe\.stages\.1\.topk=N sets"):
        load_config("train", start)
    same = load_config("train", [*start, "recipe.indexer.topk=48"])
    assert [same.model.mixers[name].indexer.topk for name in same.model.layers()] == [48, 48]
    assert load_config("train", [*start, "recipe.stages.1.topk=24"]).recipe.stages[1].topk == 24
