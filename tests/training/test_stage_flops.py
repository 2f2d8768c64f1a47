"""FLOPs of stages: what is computed of the model and of its teacher, against counts of real steps."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridlm.config.schema import Config, RecipeConfig, StageConfig, TrainingConfig
from hybridlm.interop.checkpoint_folders import save_checkpoint
from hybridlm.model.config import ModelConfig, ScheduleConfig
from hybridlm.model.cost import forward_flops, mixer_forward_flops, training_flops, training_parts
from hybridlm.model.feed_forward import DenseConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, IndexerConfig
from hybridlm.model.model import HybridLM
from hybridlm.run_config import load_config
from hybridlm.training.distillation import LayerTarget, TeacherGuide
from hybridlm.training.sparse_attention import set_attention
from hybridlm.training.stage_flops import TeacherCost, run_flops, stage_flops
from hybridlm.training.stages import Stage, plan_stages, set_trainable
from tests.support import tiny_run

LENGTH = 32
OPTIONS = {"vocab_size": 8, "hidden_size": 64, "num_layers": 3, "feed_forward": DenseConfig(intermediate_size=128)}
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16)
ALIGN = {"lm": 0, "layer_output": 1}


def model_config(new="full", **full) -> ModelConfig:
    mixers = {"full": replace(ATTENTION, **full), "new": ATTENTION, "linear": DeltaRuleConfig(num_heads=4, head_dim=16)}
    config = tiny_run.model(**OPTIONS, mixers=mixers, schedule=ScheduleConfig(pattern=[new, "full", new]))
    return replace(config, mtp=replace(config.mtp, depth=0))


def stage(**options) -> Stage:
    given = StageConfig(name="s", **options)
    recipe = RecipeConfig(name="r", stages=[given])
    config = Config(model=model_config(), training=TrainingConfig(sequence_length=LENGTH), recipe=recipe)
    return plan_stages(config)[0]


def new_mixers(config):
    return [name for name, _ in HybridLM(config).named_parameters() if name.startswith(("layers.0.mixer.",
                                                                                        "layers.2.mixer."))]


@pytest.mark.parametrize("kind", ["align", "distill", "indexers", "whole"])
def test_counts_are_those_of_a_real_step(kind, monkeypatch):
    """New mixers are attention here. A counter sees all products of matrices but not those inside attention."""
    whole = AttentionConfig.flops_per_token
    monkeypatch.setattr(AttentionConfig, "flops_per_token", lambda self, context, length: {
        part: flops for part, flops in whole(self, context, length).items() if part != "attention"})
    full = {"indexer": IndexerConfig(num_heads=2, head_dim=16, topk=4, mode="dense")} if kind == "indexers" else {}
    config = model_config("new", **full)
    model, teacher = HybridLM(config), HybridLM(model_config()).requires_grad_(False)
    options = {"align": {"inputs": "teacher", "trainable": ["layers.0.mixer.*", "layers.2.mixer.*"],
                         "loss_weights": ALIGN},
               "distill": {"loss_weights": {"lm": 0, "teacher_kl": 1}},
               "indexers": {"trainable": ["*.indexer.*"], "loss_weights": {"lm": 0}, "attention_mode": "dense"},
               "whole": {}}[kind]
    chosen = stage(**options)
    trained = set_trainable(model, chosen)
    set_attention(model, chosen)
    cost = None
    if kind == "align":
        for layer in (0, 2):
            model.layers[layer].mixer_stand_in = LayerTarget(teacher.layers[layer].mixer, True)
    if kind == "distill":
        model.guide = TeacherGuide(teacher)
    if kind in ("align", "distill"):
        cost = TeacherCost(teacher.config, (0, 2))
    ids = torch.randint(0, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model.train()(ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)
    counted = counter.get_total_flops() / ids.numel()
    # Inputs of an alignment need no gradient: 2 layers, q, k and v. A backward counts as twice a forward all the same.
    unneeded = 2 * 2 * 64 * (64 + 32 + 32) if kind == "align" else 0
    assert counted == pytest.approx(stage_flops(config, chosen, trained, cost) - unneeded,
                                    rel={"align": 1e-9, "indexers": 0.12}.get(kind, 0.01))  # losses make logits twice


def test_alignment_has_the_backward_of_the_new_mixers_alone():
    config, attention = model_config("linear"), model_config()
    trained = new_mixers(config)
    cost = TeacherCost(attention, (0, 2))
    chosen = stage(inputs="teacher", loss_weights=ALIGN)
    new, old = (mixer_forward_flops(model, (0, 2), LENGTH) for model in (config, attention))
    forward = sum(forward_flops(config, LENGTH).values()) - forward_flops(config, LENGTH)["head"]
    assert stage_flops(config, chosen, trained, cost) == pytest.approx(forward + old + 2 * new)
    everything = [*trained, "norm.weight"]
    whole = training_flops(config, LENGTH)
    assert stage_flops(config, chosen, everything, cost) == pytest.approx(whole + old)
    assert stage_flops(config, stage(), everything) == whole
    kl = stage(loss_weights={"lm": 0, "teacher_kl": 1})
    assert stage_flops(config, kl, everything, cost) == pytest.approx(
        whole + sum(forward_flops(attention, LENGTH).values()))


def test_indexers_learn_from_their_own_loss():
    config = model_config("full", indexer=IndexerConfig(num_heads=2, head_dim=16, topk=4, mode="dense"))
    parts = training_parts(config, LENGTH)
    warm = stage(attention_mode="dense", loss_weights={"lm": 0})
    expected = parts["forward"] - forward_flops(config, LENGTH)["head"] + parts["selector_losses"]
    assert parts["selector_losses"] > 0
    assert stage_flops(config, warm, ["layers.0.mixer.indexer.q_proj.weight"]) == pytest.approx(expected)
    idle = stage(attention_mode="dense", loss_weights={"indexer_kl": 0})
    assert stage_flops(config, idle, ["norm.weight"]) == pytest.approx(parts["forward"] + parts["backward"])


def test_the_loss_of_a_selector_counts_where_its_own_weight_is_not_zero():
    config = load_config("train", ["model=hybrid_tiny", "model.schedule.full=msa"]).model
    loss = training_parts(config, LENGTH)["selector_losses"]
    assert loss > 0
    whole = stage_flops(config, stage(), ["norm.weight"])
    assert stage_flops(config, stage(loss_weights={"indexer_kl": 0}), ["norm.weight"]) == whole
    assert stage_flops(config, stage(loss_weights={"selector_kl": 0}), ["norm.weight"]) == pytest.approx(whole - loss)


def test_the_flops_of_a_run_read_no_weights_of_its_teacher(tmp_path):
    config = Config(model=model_config(), training=TrainingConfig(sequence_length=LENGTH))
    teacher = tmp_path / "teacher"
    save_checkpoint(HybridLM(config.model), teacher)
    weights = next(teacher.glob("*.safetensors"))
    weights.write_bytes(bytes(weights.stat().st_size))  # of the right size, and nothing else is right
    config = replace(config, teacher=str(teacher),
                     recipe=RecipeConfig(name="r", stages=[StageConfig(name="s", loss_weights={"teacher_kl": 1})]))
    plain = replace(config, teacher=None, recipe=RecipeConfig(name="r", stages=[StageConfig(name="s")]))
    forward = sum(forward_flops(config.model, LENGTH, mtp=False).values())
    assert run_flops(config) == pytest.approx([run_flops(plain)[0] + forward])
