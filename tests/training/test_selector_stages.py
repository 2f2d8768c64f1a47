"""Stages of training switch attention to selected blocks, and the loss of its selector."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.loss_names import model_losses
from hybridlm.model.mixers.contract import SequenceMixer
from hybridlm.model.model import HybridLM, build_model
from hybridlm.run_config import load_config
from hybridlm.training.sparse_attention import freeze_idle_indexers, measuring_recall, set_attention, stage_model
from hybridlm.training.stages import plan_stages

STAGES = ("recipe.stages=[{name: a, attention_mode: dense, steps: 1, loss_weights: {selector_kl: 0}}, "
          "{name: b, attention_mode: sparse, steps: 1}]")


def test_a_stage_sets_the_mode_and_the_loss_of_the_selectors():
    config = load_config("train", ["model=hybrid_tiny", "model.schedule.full=seer_attention", STAGES,
                                   "model.mixers.seer_attention={block: 4, topk: 3}"])
    model = HybridLM(config.model)
    model.init_weights(0)
    name = next(name for name in config.model.layers() if config.model.mixers[name].has_selector())
    mixers = [layer.mixer for layer in model.layers if hasattr(layer.mixer, "selector")]
    ids = torch.randint(0, config.model.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    outputs = []
    for stage, mode in zip(plan_stages(config), ("dense", "sparse"), strict=True):
        set_attention(model, stage)
        freeze_idle_indexers(model)
        assert {mixer.attention_mode for mixer in mixers} == {mode}
        assert stage_model(config.model, stage).mixers[name].mode == mode
        learns = mode == "sparse"
        assert {mixer.kl_weight > 0 for mixer in mixers} == {learns}
        if not learns:
            assert not any(p.requires_grad for mixer in mixers for p in mixer.selector.parameters())
            for mixer in mixers:
                mixer.selector.requires_grad_(True)
        with torch.no_grad(), measuring_recall(model):
            outputs.append(model.eval()(ids).logits)
    assert not torch.allclose(outputs[0], outputs[1]), "the selection leaves keys out"


def test_a_mode_needs_a_selection_and_topk_whole_blocks():
    with pytest.raises(ConfigError, match="needs a model with sparse attention"):
        load_config("train", ["model=minimax_01_tiny", STAGES.replace(", loss_weights: {selector_kl: 0}", "")])
    with pytest.raises(ConfigError, match=r"recipe.stages.0.topk: is not a number of whole pools or blocks of"):
        load_config("train", ["model=minimax_01_tiny", "model.schedule.full=moba",
                              "recipe.stages=[{name: a, topk: 4, steps: 1}]"])


MOBA = "{kind: block_attention, num_heads: 4, head_dim: 8, block: %d, topk: 2, selector: {kind: mean}}"
FORMS = {
    "csa": ["model.schedule.full=csa", "model.mixers.csa={window: 4, ratio: 4, indexer: {topk: 1}}"],
    "parallel": ["model.schedule.full=two", "model.mixers.two={kind: parallel, branches: {blocks: %s, all: {kind: "
                 "attention, num_heads: 4, head_dim: 8}}}" % (MOBA % 4)],
    "mtp": ["model.schedule.full=blocks", f"model.mixers.blocks={MOBA % 4}", "model.mtp={depth: 1}"],
    "mixer of mtp alone": ["model.schedule.full=full", f"model.mixers.blocks={MOBA % 4}",
                           "model.mtp={depth: 1, mixer: blocks}"]}


def _selections(model):
    return [(name, mixer.selected_keys()) for name, mixer in model.named_modules() if isinstance(mixer, SequenceMixer)]


@pytest.mark.parametrize(("form", "options"), [
    (form, options) for form in FORMS
    for options in ("topk: 16", "topk: 16, dense_layers: [-1]", "attention_mode: dense")
    if form != "mixer of mtp alone" or "dense_layers" not in options])
def test_the_config_of_a_stage_is_the_model_that_the_stage_trains(form, options):
    """A model built from it selects as many keys in each place, and computes the same bits."""
    config = load_config("train", ["model=minimax_01_tiny", *FORMS[form],
                                   f"recipe.stages=[{{name: a, steps: 1, {options}}}]"])
    (stage,) = plan_stages(config)
    staged = HybridLM(config.model)
    staged.init_weights(0)
    set_attention(staged, stage)
    built = HybridLM(stage_model(config.model, stage))
    built.load_state_dict(staged.state_dict())
    assert _selections(built) == _selections(staged)
    own = _selections(HybridLM(config.model))
    assert _selections(staged) != own, "the stage changes the selection"
    selected = {name: keys for name, keys in _selections(staged) if keys is not None}
    assert set(selected.values()) <= {16}
    assert bool(selected) == ("topk" in options and ("mtp" in form or "dense" not in options))
    ids = torch.randint(0, config.model.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(built.eval()(ids).logits, staged.eval()(ids).logits)


def test_topk_fits_the_mixer_of_multi_token_prediction_too():
    words = ["model=minimax_01_tiny", "model.schedule.full=small", f"model.mixers.small={MOBA % 8}",
             f"model.mixers.big={MOBA % 64}", "recipe.stages=[{name: a, topk: 32, steps: 1}]"]
    with pytest.raises(ConfigError, match=r"stages\.0\.topk: .* of mixer big; got 32; expected a multiple of 64"):
        load_config("train", [*words, "model.mtp={depth: 1, mixer: big}"])
    config = load_config("train", words)
    changed = stage_model(config.model, plan_stages(config)[0])
    assert changed.mixers["big"] == config.model.mixers["big"], "a mixer in no place stays as it is"
    assert changed.mixers["small"].topk == 4


@pytest.mark.parametrize("words", [
    ["model=deepseek_v4_tiny"], ["model=hybrid_tiny", "model.schedule.full=seer_attention"],
    ["model=kda_dsa_tiny"], ["model=hybrid_tiny", "model.schedule.full=moba"],
    ["model=hybrid_tiny", "model.schedule.linear=mom", "model.mtp.depth=1"],
    ["model=hybrid_tiny", "model.schedule.full=both", "model.mixers.both={kind: parallel, branches: {"
     "a: {kind: attention, num_heads: 2, head_dim: 16}, "
     "b: {kind: block_attention, num_heads: 2, head_dim: 16, selector: {kind: gate}}}}"],
    ["model=quickstart", "model.feed_forward.balance_loss=0"]])
def test_the_losses_that_a_config_names_are_those_of_its_model(words):
    config = load_config("train", words).model
    model = build_model(config).train()
    ids = torch.randint(0, config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    assert {*model(ids, labels=ids).losses, "z"} == {*model_losses(config)}


def test_layers_of_compressed_entries_may_stay_dense():
    config = load_config("train", [
        "model=deepseek_v4_tiny",
        "recipe.stages=[{name: a, attention_mode: sparse, topk: 64, dense_layers: [-2], steps: 1}]"])
    stage, model = plan_stages(config)[0], build_model(config).eval()
    set_attention(model, stage)
    assert [layer.mixer.attention_mode for layer in model.layers] == ["dense", "sparse", "dense", "dense", "dense"]
    saved = stage_model(config.model, stage)
    assert saved.layers() == ["near", "csa", "hca", "csa_dense", "hca"]
    assert [saved.mixers[name].indexer.mode for name in ("csa", "csa_dense")] == ["sparse", "dense"]
    assert {saved.mixers[name].indexer.topk for name in ("csa", "csa_dense")} == {64 // 4}
    ids = torch.randint(0, config.model.vocab_size, (1, 160), generator=torch.Generator().manual_seed(0))
    again = build_model(saved)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = model(ids).logits
        assert torch.equal(again.eval()(ids).logits, found)
        model.layers[3].mixer.set_attention("sparse", {})
        assert not torch.equal(model(ids).logits, found), "40 entries, of which 16 would be read"


def test_layers_that_are_dense_already_get_no_second_name():
    config = load_config("train", ["model=kda_dsa_tiny", "model.num_layers=8",
                                   "recipe.stages=[{name: a, attention_mode: dense, steps: 1}]"])
    stage = plan_stages(config)[0]
    named = [i for i, name in enumerate(config.model.layers()) if config.model.mixers[name].has_indexer()][:1]
    stage.dense_layers = named
    assert stage_model(config.model, stage).layers() == config.model.layers()
    stage.attention_mode = "sparse"
    assert stage_model(config.model, stage).layers()[named[0]] == "dsa_dense"
