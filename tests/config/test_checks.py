"""Checks across the parts of a run."""

from copy import deepcopy

import pytest

from hybridlm.config.checks import check_effective, check_patterns, parameter_names
from hybridlm.config.schema import REPLACED_BY_STAGE
from hybridlm.errors import ConfigError
from hybridlm.optimizers.lr_schedule import LRScheduleConfig
from hybridlm.run_config import load_config
from hybridlm.training.stages import plan_stages


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.path=texts/", "run_dir=./texts"], "run_dir: is the folder of the text; got './texts'; expected another "
     "folder"),
    (["model.vocab_size=256"], "model.vocab_size: is smaller than the tokenizer's vocabulary; got 256; expected at "
     "least 257 for data.tokenizer=bytes"),
    (["data.tokenizer=bpe"], "model.vocab_size: is smaller than the tokenizer's vocabulary; got 512; expected at least "
     "data.tokenizer_vocab_size=4096"),
    (["training.sequence_length=5000"], "training.sequence_length: is longer than the model is meant for; got 5000; "
     "expected at most model.max_position=4096"),
    (["recipe.stages.0.sequence_length=5000"],
     "recipe.stages.0.sequence_length: is longer than the model is meant for; got 5000; "
     "expected at most model.max_position=4096"),
    (["training.micro_batch_size=4", "recipe.stages.0.batch_size=6"],
     "recipe.stages.0.batch_size: does not divide into micro batches; got 6; "
     "expected a multiple of training.micro_batch_size=4"),
    (["training.micro_batch_size=3"],
     "training.micro_batch_size: must divide batch_size; got 3; expected a divisor of 8"),
    (["recipe.stages.0.steps=1", "recipe.stages.0.tokens=2"],
     "recipe.stages.0.tokens: cannot stand beside 'steps'; got 2; expected one of the two"),
    (["recipe.stages=[{name: a}, {name: a}]"], "recipe.stages: two stages have one name; got ['a', 'a']"),
    (["training.compile=true", "engine=ddp", "engine.context_parallel=2"], "training.compile: does not go with "
     "engine.context_parallel, which exchanges tensors in the middle of a layer's graph; got True; expected false, or "
     "engine.context_parallel=1"),
    (["training.compile=true", "engine=ddp", "engine.expert_parallel=2"], "training.compile: does not go with "
     "engine.expert_parallel, which exchanges tensors in the middle of a layer's graph; got True; expected false, or "
     "engine.expert_parallel=1"),
    (["training.compile=true", "engine=zero3"], "training.compile: does not go with engine.kind=zero3, which gathers "
     "weights in the middle of a layer's graph; got True; expected false, or engine=ddp, zero1 or zero2"),
    (["recipe.stages=[]"], "recipe.stages: is empty; expected at least one stage"),
    (["recipe.stages.0.trainable=[lm_hed.weight]"],
     "recipe.stages.0.trainable.0: matches no parameter of the model; got 'lm_hed.weight'; "
     "expected a shell pattern over parameter names; did you mean 'lm_head.weight'?"),
    (["recipe.stages.0.trainable=['layers.*.mixer.f.*']"],
     "recipe.stages.0.trainable.0: matches no parameter of the model; got 'layers.*.mixer.f.*'; "
     "expected a shell pattern over parameter names; parameters were renamed: 'layers.*.mixer.*'"),
    (["init_from=/nowhere/run"],
     "init_from: no such checkpoint; got '/nowhere/run'; expected a run folder or a checkpoint folder"),
    (["model.feed_forward.dense_layers=[9]", "model.feed_forward.intermediate_size=8"],
     "model.feed_forward.dense_layers: names a layer the model does not have; got [9]; expected layers 0 to 3"),
    (["model=kda_dsa_tiny", "recipe=dsa_scratch", "model.mixers.dsa.indexer.pool=16", "recipe.stages.1.topk=40"],
     "recipe.stages.1.topk: is not a number of whole pools or blocks of mixer dsa; got 40; expected a multiple of 16"),
    (["model=kda_dsa_tiny", "recipe.stages.0.loss_weights={selector_kl: 0}"],
     "recipe.stages.0.loss_weights.selector_kl: is a loss that the model does not have; got 0.0; "
     "expected one of lm, z, indexer_kl, balance, layer_output, hidden, teacher_kl"),
    (["model=qwen3_next_tiny", "recipe.stages.0.loss_weights={balance: 0.1, router_z: 0.1}"],
     "recipe.stages.0.loss_weights.router_z: is a loss that the model does not have; got 0.1; "
     "expected one of lm, mtp, z, balance, layer_output, hidden, teacher_kl"),
    (["model=hybrid_tiny", "model.schedule.full=moba", "recipe.stages.0.loss_weights={selector_kl: 1}"],
     "recipe.stages.0.loss_weights.selector_kl: is a loss that the model does not have; got 1.0; "
     "expected one of lm, z, balance, layer_output, hidden, teacher_kl"),
    (["model=hybrid_tiny", "model.schedule.full=nsa", "recipe.stages.0.attention_mode=dense"],
     "recipe.stages.0.attention_mode: needs a model with sparse attention whose selection a stage can switch; "
     "got 'dense'; convert a checkpoint with recipe=sparse_tiny init_from=..., or take a model such as kda_dsa_tiny"),
    (["model=hybrid_tiny", "model.schedule.full=moba", "recipe.stages.0.dense_layers=[-1,0]"],
     "recipe.stages.0.dense_layers: names a layer without a selection to switch off; got 0; "
     "expected some of [3]"),
    (["kernels.strict=maybe"], "kernels.strict: has the wrong type; got 'maybe'; expected true, false or null"),
])
def test_sections_that_do_not_fit_give_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("train", overrides)
    assert str(caught.value) == message


def test_unknown_operations_and_backends():
    with pytest.raises(ConfigError) as caught:
        load_config("train", ["kernels.delta_rul=torch"])
    assert str(caught.value).startswith("kernels.delta_rul: unknown operation; expected strict, or one of attention, ")
    assert str(caught.value).endswith("did you mean 'delta_rule'?")
    with pytest.raises(ConfigError) as caught:
        load_config("train", ["kernels.delta_rule=tritn"])
    assert str(caught.value).startswith("kernels.delta_rule: unknown backend; got 'tritn'; expected auto, or one of ")
    assert load_config("train", ["kernels.delta_rule=reference"]).kernels == {"delta_rule": "reference"}


def test_patterns_over_parameter_names():
    config = load_config("train", ["model=deepseek_v32_tiny", "recipe.stages.0.trainable=['*.indexer.*']"])
    names = parameter_names(config)
    assert any(".indexer." in name for name in names)
    check_patterns(["*", "layers.?.mixer.*"], names, "here")
    with pytest.raises(ConfigError, match=r"here.1: matches no parameter"):
        check_patterns(["*", "layers.9.*"], names, "here")


@pytest.fixture(scope="module")
def default_config():
    return load_config("train")


@pytest.mark.parametrize(("setting", "key"), [(setting, key) for setting, keys in REPLACED_BY_STAGE.items()
                                              for key in keys])
def test_settings_that_a_stage_replaces_are_those_that_its_plan_does_not_read(default_config, setting, key):
    values = {"steps": 7, "tokens": 4096, "sequence_length": 16, "batch_size": 3, "lr": 0.5,
              "schedule": LRScheduleConfig(kind="constant")}
    section, name = setting.split(".")
    before, after = deepcopy(default_config), deepcopy(default_config)
    setattr(getattr(after, section), name, values[name])
    assert plan_stages(before) != plan_stages(after)
    check_effective(after.recipe, [setting])
    for config in (before, after):
        setattr(config.recipe.stages[0], key, values[key])
    assert plan_stages(before) == plan_stages(after)
    with pytest.raises(ConfigError) as error:
        check_effective(after.recipe, [setting])
    assert error.value.key == setting
    assert error.value.expected == f"recipe.stages.N.{key} with N 0"
