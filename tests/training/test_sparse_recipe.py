"""Sparse attention for a dense checkpoint by every selector: what is converted, learns, goes on, and is refused."""

import re

import pytest
import torch

from hybridlm import checkpoint
from hybridlm.errors import ConfigError
from hybridlm.interop import import_checkpoint, save_checkpoint
from hybridlm.interop.surgery import convert_attention
from hybridlm.model.model import build_model
from hybridlm.run_config import load_config
from hybridlm.training import train
from hybridlm.training.sparse_attention import freeze_idle_indexers, set_attention
from hybridlm.training.stages import plan_stages, set_trainable
from tests.support import tiny_run
from tests.support.hf_zoo import build
from tests.support.tiny_run import weights

WITHOUT_PARAMETERS = ["moba", "infllm_v2", "quest"]
LEARNING = ["seer_attention", "msa", "qsa", "dsa", "dsa_pooled"]
STEPS = (2, 3)  # of the two stages


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama of transformers, imported, beside a text."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_run.config(folder)  # writes the text
    build("llama", vocab_size=257, num_hidden_layers=3).save_pretrained(folder / "theirs")
    import_checkpoint(folder / "theirs", folder / "dense")
    return folder / "dense"


def options(mixer):
    """The preset of a mixer, small enough that it leaves keys out of rows of 32 tokens."""
    if mixer in ("dsa", "dsa_pooled"):
        return "mixer={kind: mla, indexer: {topk: 8, num_heads: 4, head_dim: 8%s}}" % (
            ", pool: 4" if mixer == "dsa_pooled" else "")
    kinds = {"moba": "kind: mean", "infllm_v2": "kind: compressed, normaliser: coarse", "quest": "kind: bound",
             "seer_attention": "kind: gate", "msa": "kind: index_heads",
             "qsa": "kind: index_heads, num_heads: 4, lists_for: all, reduce: mean, relu: true"}
    return f"mixer={{kind: block_attention, block: 4, topk: 3, selector: {{{kinds[mixer]}}}}}"


def settings(llama, run_dir, mixer, *more):
    return load_config("train", [
        "recipe=sparse_tiny", f"recipe.convert.{options(mixer)}", f"init_from={llama}", f"run_dir={run_dir}",
        f"data.path={llama.parent}/text.py", f"data.cache_dir={llama.parent}/cache", "data.validation_fraction=0.1",
        *(f"recipe.stages.{i}.{key}={value}" for i in (0, 1) for key, value in {
            "steps": STEPS[i], "sequence_length": 32, "batch_size": 2, "lr": "1e-2"}.items()),
        "training.eval_batches=1", "training.eval_every=0", "training.checkpoint_every=100",
        "training.keep_checkpoints=10", "optimizer.schedule.kind=constant", "optimizer.schedule.warmup=0", *more])


@pytest.fixture(scope="module")
def done(llama, tmp_path_factory):
    """A whole conversion by index heads; tests leave it as it is."""
    return train(settings(llama, tmp_path_factory.mktemp("sparse") / "run", "msa"))


@torch.no_grad()
@pytest.mark.parametrize("preset", [*WITHOUT_PARAMETERS, *LEARNING])
def test_a_llama_with_any_selector_computes_what_it_did_until_it_selects(llama, preset):
    dense = checkpoint.load_checkpoint(llama)
    model, transfer = convert_attention(dense, [0, 2], preset)
    assert set(transfer.kept) == {name for name, _ in dense.named_parameters() if name.startswith(
        ("layers.0.mixer.", "layers.2.mixer."))}
    learned = {name for name, _ in model.named_parameters()} - {name for name, _ in dense.named_parameters()}
    assert set(transfer.fresh) == learned
    assert bool(learned) == (preset in LEARNING)
    assert all(".indexer." in name or ".selector." in name for name in learned)
    ids = torch.randint(257, (2, 200), generator=torch.Generator().manual_seed(0))
    for mode, same in (("dense", True), ("sparse", False)):
        for layer in (0, 2):
            model.layers[layer].mixer.set_attention(mode, {})
        assert torch.equal(model.eval()(ids).logits, dense(ids).logits) == same


@pytest.mark.parametrize(("preset", "block", "topk"), [("moba", 4, 8), ("qsa", 4, 8), ("dsa", 1, 32)])
def test_open_sizes_follow_the_longest_sequence_of_the_stages(tmp_path, preset, block, topk):
    """Of a model for 4096 tokens that is trained on 256."""
    save_checkpoint(build_model(load_config("train", ["model=hybrid_tiny"])), tmp_path / "dense")
    words = ["recipe=sparse_tiny", f"recipe.convert.mixer={preset}", f"init_from={tmp_path}/dense"]
    model = load_config("train", words).model
    mixer = model.mixers[model.layers()[3]]
    sizes = getattr(mixer, "indexer", mixer)
    assert (mixer.topk_multiple(), sizes.topk) == (block, topk)
    config = load_config("train", [*words, f"recipe.stages.1.topk={2 * topk * block}"])
    assert len(plan_stages(config)) == 2


@pytest.mark.parametrize("preset", [*WITHOUT_PARAMETERS, *LEARNING])
def test_a_converted_mixer_attends_to_all_keys_until_something_has_trained_its_selector(preset):
    model = build_model(load_config("train", ["model=hybrid_tiny"]).model, device="meta")
    converted = convert_attention(model, [-1], preset)[0].config
    mixer = converted.mixers[converted.layers()[-1]]
    waits = preset in LEARNING
    assert bool(mixer.selector_parameters()) == waits
    assert (mixer == mixer.with_attention_mode("dense")) == waits
    assert (mixer == mixer.with_attention_mode("sparse")) != waits
    asked = {"kind": "block_attention", "selector": {"kind": "gate"}, "mode": "sparse"}
    config = convert_attention(model, [-1], asked)[0].config
    assert config.mixers[config.layers()[-1]].mode == "sparse"


def test_what_attention_can_become_is_listed_and_true():
    model = build_model(load_config("train", ["model=hybrid_tiny"]).model, device="meta")
    with pytest.raises(ConfigError, match="cannot start from the weights of attention; got 'nsa'") as error:
        convert_attention(model, [-1], "nsa")
    names = error.value.expected.split("or one of ")[1].split(", ")
    assert {*WITHOUT_PARAMETERS, *LEARNING, "kda", "gdn", "lightning", "mamba2", "rwkv7", "lolcats"} <= {*names}
    assert not {"nsa", "csa", "hca", "mla", "no_mixer"} & {*names}
    for name in names:
        config = convert_attention(model, [-1], name)[0].config
        assert not config.mixers[config.layers()[-1]].can_take_indexer(), f"{name} leaves full attention"


def test_dsa_is_an_option_of_the_attention_that_is_there():
    model = build_model(load_config("train", ["model=kimi_linear_tiny"]).model, device="meta")
    config = convert_attention(model, [-1], "dsa")[0].config
    assert config.layers()[3] == "full"
    converted = config.mixers[config.layers()[-1]]
    assert (converted.kind, converted.indexer.mode, converted.indexer.rope_kind) == ("mla", "dense", "none")
    with pytest.raises(ConfigError, match="layer 3: has no softmax attention with plain q, k, v and o projections"):
        convert_attention(model, [3], "moba")


@pytest.mark.parametrize("mixer", LEARNING)
def test_what_teaches_a_selector_reaches_it_alone_in_both_stages(llama, mixer):
    config = settings(llama, llama.parent / "none", mixer)
    model = build_model(config).train()
    selectors = {name for name, _ in model.named_parameters() if ".indexer." in name or ".selector." in name}
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    for stage in plan_stages(config):
        trained = set(set_trainable(model, stage))
        assert trained == (selectors if stage.index == 0 else {name for name, _ in model.named_parameters()})
        model.requires_grad_(True)
        stage.loss_weights = {"lm": 0.0}
        set_attention(model, stage)
        model(ids, targets=ids[..., None], cu_seqlens=[0, 5, 32, 64]).loss.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == selectors
        model.zero_grad(set_to_none=True)
        stage.loss_weights = {"indexer_kl": 0.0, "selector_kl": 0.0}
        set_attention(model, stage)
        freeze_idle_indexers(model)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == selectors


def test_the_stages_train_what_they_say(llama, done):
    before, warm, after = weights(llama), weights(done.run_dir / "checkpoints" / "step-2"), weights(done.run_dir)
    fresh = set(warm) - set(before)
    assert {name.split(".mixer.")[1] for name in fresh} == {
        f"selector.{name}.weight" for name in ("q_proj", "k_proj", "q_norm", "k_norm")}
    assert all(torch.equal(warm[name], before[name]) for name in before)
    assert {name for name in warm if torch.equal(warm[name], after[name])} == set()
    folder = done.run_dir / "checkpoints" / "step-2"
    assert {key.split("/", 1)[1] for key in weights(folder, "optimizer")} == fresh
    text = (done.run_dir / "log.txt").read_text()
    assert "trained: layers.{0-2}.mixer.selector.q_proj.weight" in text
    for step, mode in ((2, "dense"), (5, "sparse")):
        model = checkpoint.load_checkpoint(done.run_dir / "checkpoints" / f"step-{step}")
        assert {layer.mixer.attention_mode for layer in model.layers} == {mode}
    rows = tiny_run.records(done.run_dir)
    assert [row["stage"] for row in rows] == ["selector"] * 2 + ["sparse"] * 3
    assert rows[0]["total_loss"] == pytest.approx(rows[0]["loss/selector_kl"])
    assert 0 < rows[1]["validation_stat/selector_recall"] <= 1


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_stopped_in_either_stage_goes_on_there_by_the_same_words(llama, done, step, tmp_path, monkeypatch):
    tiny_run.check_resume(monkeypatch, lambda: settings(llama, tmp_path / "run", "msa"), step, done.run_dir)
    again = settings(llama, tmp_path / "run", "msa")
    assert again.recipe.convert.converted == [0, 1, 2]
    assert train(again).status == "finished"


def test_a_run_stopped_in_a_stage_with_dense_layers_goes_on_as_it_was(llama, tmp_path, monkeypatch):
    """The checkpoint of the stage has other names of mixers than the model of the run."""
    def config(name):
        return settings(llama, tmp_path / name, "seer_attention", "recipe.stages.0.steps=1", "recipe.stages.1.steps=2",
                        "recipe.stages.1.dense_layers=[0,-1]", "training.checkpoint_every=1")

    done = train(config("done")).run_dir
    tiny_run.check_resume(monkeypatch, lambda: config("run"), 2, done)
    for folder in (done / "checkpoints" / "step-2", tmp_path / "run"):
        model = checkpoint.load_checkpoint(folder)
        assert [layer.mixer.attention_mode for layer in model.layers] == ["dense", "sparse", "dense"]
    start = checkpoint.load_checkpoint(tmp_path / "run" / "converted")
    assert {layer.mixer.attention_mode for layer in start.layers} == {"dense"}, "nothing has trained its gates"


def test_a_selector_without_parameters_has_no_stage_of_its_own(llama, tmp_path):
    """Lengths decide about the mode, and layers may stay dense: the checkpoint says so."""
    config = settings(llama, tmp_path / "run", "moba", "recipe.stages.1.dense_layers=[-1]", "recipe.stages.1.topk=8",
                      "recipe.stages.1.steps=1")
    assert [stage.steps for stage in plan_stages(config)] == [0, 1]
    run = train(config).run_dir
    assert "stage selector: left out" in (run / "log.txt").read_text()
    model = checkpoint.load_checkpoint(run)
    assert [layer.mixer.attention_mode for layer in model.layers] == ["sparse", "sparse", "dense"]
    assert [layer.mixer.budget.topk for layer in model.layers] == [2, 2, 2]
    assert len(set(model.config.layers())) == 2
    short = settings(llama, tmp_path / "short", "moba", "recipe.dense_below=33", "recipe.stages.1.steps=1")
    run = train(short).run_dir
    assert "32 tokens are shorter than recipe.dense_below=33, so attention is dense" in (run / "log.txt").read_text()
    assert {layer.mixer.attention_mode for layer in checkpoint.load_checkpoint(run).layers} == {"dense"}


def test_recipe_dsa_is_this_recipe_with_one_selector(llama, tmp_path):
    ours = train(settings(llama, tmp_path / "ours", "dsa", "recipe.stages.0.steps=1", "recipe.stages.1.steps=1"))
    theirs = train(load_config("train", [
        "recipe=dsa_tiny", f"init_from={llama}", f"run_dir={tmp_path}/theirs", f"data.path={llama.parent}/text.py",
        f"data.cache_dir={llama.parent}/cache", "data.validation_fraction=0.1",
        "recipe.indexer={topk: 8, num_heads: 4, head_dim: 8}",
        *(f"recipe.stages.{i}.{word}" for i in (0, 1) for word in (
            "steps=1", "sequence_length=32", "batch_size=2", "lr=1e-2")),
        "training.eval_batches=1", "training.eval_every=0", "optimizer.schedule.kind=constant",
        "optimizer.schedule.warmup=0"]))
    assert tiny_run.losses(ours.run_dir) == tiny_run.losses(theirs.run_dir)
    found, expected = weights(ours.run_dir), weights(theirs.run_dir)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("mixer", "overrides", "text"), [
    ("msa", ["init_from=null"],
     "init_from: is missing; expected the run or checkpoint that recipe=sparse_tiny converts"),
    ("msa", ["init_from=/nowhere"], "init_from: no such checkpoint; got '/nowhere'"),
    ("msa", ["recipe.convert.mixer=msaa"], "recipe.convert.mixer: no such preset; got 'msaa'; expected one of abc"),
    ("msa", ["recipe.convert.mixer=nsa"],
     "recipe.convert.mixer: cannot start from the weights of attention; got 'nsa'"),
    ("dsa", ["recipe.convert.mixer.indexer.tpok=4"],
     "recipe.convert.mixer.indexer.tpok: unknown key; did you mean 'topk'"),
    ("dsa", ["recipe.convert.mixer.indexer=4"], "recipe.convert.mixer.indexer: has the wrong type; got 4"),
    *[("dsa", [f"recipe.convert.mixer.{option}"],
       f"recipe.convert.mixer.{option.partition('=')[0]}: has no effect: the attention that is there stays as it is")
      for option in ("window=64", "num_heads=3", "nonsense=5", "sinks=true", "rope={theta: 5}")],
    ("dsa", ["recipe.convert.init=calibrated"],
     "recipe.convert.init: has no effect: attention that gets an indexer keeps its weights; got 'calibrated'; expected "
     "copy"),
    ("moba", ["recipe.convert.mixer.block=0"], "recipe.convert.mixer.block: must be positive; got 0"),
    ("moba", ["recipe.convert.mixer.block=x"], "recipe.convert.mixer.block: has the wrong type"),
    ("msa", ["recipe.stages.0.attention_mode=sparse"],
     "recipe.stages.0.attention_mode: would select keys by a selector that nothing has trained; got 'sparse'"),
    ("moba", ["recipe.stages.1.topk=6"],
     "recipe.stages.1.topk: is not a number of whole pools or blocks of mixer block_attention; got 6"),
    ("infllm_v2", ["recipe.convert.mixer.first=2", "recipe.stages.1.topk=8"],
     "recipe.stages.1.topk: does not fit mixer block_attention: topk must hold the blocks that are always read; got 8"),
    ("moba", ["recipe.stages.1.dense_layers=[3]"],
     "recipe.stages.1.dense_layers: names a layer the model does not have; got 3; expected 0 to 2"),
    ("moba", ["recipe.stages.1.trainable=['@selector']"],
     "recipe.stages.0.trainable: names selectors without parameters: no stage has anything to train"),
    ("msa", ["recipe.dense_below=0"], "recipe.dense_below: must be positive; got 0"),
    ("msa", ["recipe.convert.keep=3"], "recipe.convert.keep: keeps all of the attention: there is nothing to convert"),
    ("msa", ["recipe.stages.1.loss_weights={teacher_kl: 1}"], "teacher: is missing"),
])
def test_mistakes_are_one_line(llama, tmp_path, mixer, overrides, text):
    with pytest.raises(ConfigError, match=re.escape(text)) as error:
        settings(llama, tmp_path, mixer, *overrides)
    assert "\n" not in str(error.value)


def test_a_model_that_selects_already_is_trained_on_without_a_conversion(llama, done, tmp_path):
    with pytest.raises(ConfigError, match=r"init_from: holds a model without full attention.*recipe\.convert=null"):
        settings(done.run_dir, tmp_path, "msa")
    stages = "recipe.stages=[{name: more, attention_mode: sparse, trainable: ['@selector'], steps: 1}]"
    config = load_config("train", ["recipe=sparse_tiny", "recipe.convert=null", stages, f"init_from={done.run_dir}",
                                   "training.sequence_length=32"])
    assert plan_stages(config)[0].trainable == [f"layers.{layer}.mixer.selector.*" for layer in range(3)]
    for words in (["recipe.dense_below=8"], ["recipe.stages=[{name: a, trainable: ['@selector']}]"]):
        with pytest.raises(ConfigError, match="sparse attention"):
            load_config("train", ["model=quickstart", *words])
