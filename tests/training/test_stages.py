import pytest
import torch

from hybridlm import load_config
from hybridlm.errors import ConfigError
from hybridlm.model.model import build_model
from hybridlm.training.sparse_attention import freeze_idle_indexers, set_attention
from hybridlm.training.stages import Progress, plan_stages, set_trainable
from tests.support import tiny_run


def test_nulls_are_filled_from_training_and_optimizer(tmp_path):
    recipe = tiny_run.stages({"name": "a"}, {"name": "b", "tokens": 1000, "sequence_length": 16, "batch_size": 3,
                                             "lr": 5e-4, "trainable": ["embed.*"]})
    a, b = plan_stages(tiny_run.config(tmp_path, recipe=recipe))
    assert (a.steps, a.sequence_length, a.batch_size, a.lr, a.index) == (8, 32, 4, 1e-2, 0)
    assert (b.steps, b.index, b.tokens_per_step) == (21, 1, 48)  # 1000 / 48, rounded up
    assert (b.lr, b.trainable) == (5e-4, ["embed.*"])


def test_tokens_take_the_place_of_steps(tmp_path):
    (stage,) = plan_stages(tiny_run.config(tmp_path, tokens=129))
    assert stage.steps == 2


def test_trainable_patterns_freeze_the_rest_and_must_name_something(tmp_path):
    config = tiny_run.config(tmp_path, recipe=tiny_run.stages(
        {"name": "a", "trainable": ["*.router.weight", "lm_head.*"]}, {"name": "b", "trainable": ["layer.0.*"]}))
    model = build_model(config)
    a, b = plan_stages(config)
    trained = set_trainable(model, a)
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["layers.1.feed_forward.router.weight", "lm_head.weight",
                       "mtp.0.block.feed_forward.router.weight"]
    with pytest.raises(ConfigError, match=r"recipe\.stages\.1\.trainable\.0.*'layer\.0\.\*'.*did you mean"):
        set_trainable(model, b)


def test_progress_counts_samples_over_stages(tmp_path):
    recipe = tiny_run.stages({"name": "a", "steps": 1}, {"name": "b", "steps": 2, "batch_size": 2})
    a, b = plan_stages(tiny_run.config(tmp_path, recipe=recipe))
    progress = Progress()
    progress.enter(a)
    progress.advance(a)
    progress.enter(b)
    progress.advance(b)
    assert (progress.step, progress.samples, progress.tokens, progress.step_in_stage) == (2, 6, 6 * 32, 1)
    assert Progress(**progress.to_dict()) == progress


SPARSE = ["kda_dsa_tiny", "deepseek_v32_tiny"]


@pytest.mark.parametrize("system", ["kimi_linear_tiny", "qwen3_next_tiny", "minimax_01_tiny", "hybrid_tiny", *SPARSE])
def test_all_that_trains_gets_a_gradient(system):
    """What sums over ranks rely on: in each stage of every kind of recipe, also of a batch without a target."""
    words = [f"model={system}", "model.hidden_size=32", "model.num_layers=2", "model.vocab_size=257",
             "data.tokenizer=bytes", *["model.schedule.ratio=1"] * (system != "deepseek_v32_tiny")]
    recipes = [[], ["recipe.stages.0.loss_weights={mtp: 0, balance: 0}"]]
    if system in SPARSE:
        recipes += [["recipe=dsa_scratch"], ["recipe=dsa_scratch", "recipe.stages.0.trainable=['*.indexer.*']",
                                             "recipe.stages.1.loss_weights={indexer_kl: 0}"]]
    for recipe in recipes:
        config = load_config("train", [*words, *recipe])
        model = build_model(config).train()
        ids_BT = torch.arange(48).view(2, 24)
        for stage in plan_stages(config):
            set_trainable(model, stage)
            set_attention(model, stage)
            freeze_idle_indexers(model)
            for target in (7, -100):
                targets_BTd = torch.full((2, 24, 1 + config.model.mtp.depth), target)
                model(ids_BT, targets=targets_BTd, cu_seqlens=[0, 5, 24, 48]).loss.backward()
                assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
                model.zero_grad(set_to_none=True)
