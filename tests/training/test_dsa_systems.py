"""The conversion works from every tiny system with full layers: MLA and GQA, with and without rotation, gates, MTP."""

import pytest
import torch

from hybridlm import checkpoint
from hybridlm.interop import save_checkpoint
from hybridlm.model.model import build_model
from hybridlm.run_config import load_config, load_model_config
from hybridlm.training import train
from tests.support import tiny_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_run.config(folder)
    return folder


def indexers(model):
    """The options of the indexer of each layer that has one."""
    found = {i: getattr(model.mixers[name], "indexer", None) for i, name in enumerate(model.layers())}
    return {i: indexer for i, indexer in found.items() if indexer is not None}


@pytest.mark.parametrize(("system", "converted", "rope"), [
    ("kimi_linear_tiny", {3, 6}, "none"), ("minimax_01_tiny", {7}, "half"), ("qwen3_next_tiny", {3}, "half"),
    ("hybrid_tiny", {3}, "half"), ("deepseek_v32_tiny", set(), "half")])
def test_both_stages_run(system, converted, rope, text, tmp_path):
    dense = build_model(load_model_config(system))
    before = {name: tensor.clone() for name, tensor in checkpoint.unique_tensors(dense).items()}
    save_checkpoint(dense, tmp_path / "dense")
    config = load_config("train", [
        "recipe=dsa_tiny", f"init_from={tmp_path}/dense", f"run_dir={tmp_path}/run", f"data.path={text}/text.py",
        f"data.cache_dir={text}/cache", "data.validation_fraction=0.1", "training.eval_batches=1",
        "recipe.indexer.topk=6", *(f"recipe.stages.{i}.{value}" for i in (0, 1) for value in (
            "steps=1", "sequence_length=72", "batch_size=1"))])
    indexed, had = indexers(config.model), indexers(dense.config)
    assert set(indexed) == converted | set(had)
    assert all(indexed[i].rope_kind == rope for i in converted)
    result = train(config)
    assert [row["stage"] for row in tiny_run.records(result.run_dir)] == ["indexer_warmup", "sparse"]
    assert 0 < result.validation["validation_dsa/indexer_recall"] < 1
    warm = dict(checkpoint.read_tensors(result.run_dir / "checkpoints" / "step-1", "model"))
    assert all(torch.equal(warm[name], tensor) for name, tensor in before.items() if ".indexer." not in name)


def test_one_indexer_for_several_layers_trains_on_all_of_them(text, tmp_path):
    save_checkpoint(build_model(load_model_config("hybrid_tiny", ["model.schedule.ratio=0"])), tmp_path / "dense")
    start = ["recipe=dsa_tiny", f"init_from={tmp_path}/dense", f"run_dir={tmp_path}/run", f"data.path={text}/text.py",
             f"data.cache_dir={text}/cache", "data.validation_fraction=0.1", "training.eval_batches=1",
             "recipe.indexer.topk=8", "recipe.indexer.pool=4", *(f"recipe.stages.{i}.{value}" for i in (0, 1)
                                                                 for value in ("sequence_length=72", "batch_size=1",
                                                                               "steps=1"))]
    config = load_config("train", [*start, "recipe.indexer.share=3"])
    assert config.model.layers() == ["full_dsa", "full_dsa_shared", "full_dsa_shared", "full_dsa"]
    assert {name: mixer.indexer.share for name, mixer in config.model.mixers.items()
            if name.startswith("full_dsa")} == {"full_dsa": False, "full_dsa_shared": True}
    result = train(config)
    warm = tiny_run.records(result.run_dir)[0]
    each = [warm[f"dsa/indexer_kl/{layer}"] for layer in range(4)]
    assert warm["loss/indexer_kl"] == pytest.approx(sum(each) / 4)
    assert {f"validation_dsa/indexer_recall/{layer}" for layer in range(4)} <= set(result.validation)
    own = {name.split(".")[1] for name, _ in checkpoint.load_checkpoint(result.run_dir).named_parameters()
           if ".indexer." in name}
    assert own == {"0", "3"}


def test_layers_to_convert_can_be_chosen(tmp_path):
    save_checkpoint(build_model(load_model_config("kimi_linear_tiny")), tmp_path / "dense")
    start = ["recipe=dsa_tiny", f"init_from={tmp_path}/dense"]
    model = load_config("train", [*start, "recipe.layers=[-1]"]).model
    assert model.layers() == ["kda", "kda", "kda", "full", "kda", "kda", "full_dsa"]
    model = load_config("train", [*start, "model.mixers.full.indexer.topk=5"]).model
    assert model.mixers["full"].indexer.topk == 5


def test_published_numbers_of_the_recipe():
    recipe = load_config("train", ["model=deepseek_v32_671b", "recipe=dsa", "recipe.indexer=null"]).recipe
    warm, sparse = recipe.stages
    assert (warm.steps, warm.batch_size, warm.sequence_length, warm.lr) == (1000, 16, 128 * 1024, 1e-3)
    assert (sparse.steps, sparse.batch_size, sparse.sequence_length, sparse.lr) == (15000, 480, 128 * 1024, 7.3e-6)
    assert warm.steps * warm.batch_size * warm.sequence_length == pytest.approx(2.1e9, rel=0.01)
    assert sparse.steps * sparse.batch_size * sparse.sequence_length == pytest.approx(943.7e9, rel=0.01)
    assert (warm.attention_mode, warm.trainable, sparse.attention_mode) == ("dense", ["*.indexer.*"], "sparse")


def test_kda_and_sparse_attention_three_to_one():
    for name in ("kda_dsa_tiny", "kda_dsa_1b"):
        config = load_model_config(name)
        assert config.layers()[:4] == ["kda", "kda", "kda", "dsa"]
        assert config.mixers["dsa"].indexer.mode == "sparse"
