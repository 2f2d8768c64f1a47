"""Stages of training switch attention to selected blocks, and the loss of its selector."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.model import HybridLM
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
