"""Experts over ranks: the results of one process, whatever ranks hold them, and resume on any number of them."""

import inspect
import json
import shutil
import tomllib
from dataclasses import replace
from importlib import metadata
from itertools import combinations

import pytest
import torch

from hybridlm import load_config
from hybridlm.distributed.expert_parallel import expert_parameters
from hybridlm.distributed.zero import experts as zero_experts
from hybridlm.errors import ConfigError
from hybridlm.model.cost import count_parameters
from hybridlm.model.feed_forward import MoEConfig
from hybridlm.model.model import build_model
from hybridlm.planning.communication import ParallelPlan, step_traffic, visit_probability
from hybridlm.planning.process_count import check_process_count
from hybridlm.planning.rank_memory import rank_memory
from tests.support import experts_over_ranks
from tests.support.engine_configs import engine_config
from tests.support.rank_pool import ROOT
from tests.support.run_records import assert_same_run

STEPS = 8
TRAINING = {"steps": STEPS, "batch_size": 4, "micro_batch_size": 1, "sequence_length": 16, "eval_every": 0,
            "checkpoint_every": STEPS // 2, "keep_checkpoints": 9}
TRAINED = "tests.support.experts_over_ranks:check_training"

STAGES = [{"name": "frozen", "steps": 2, "trainable": ["*.mixer.*"]},
          {"name": "alone", "steps": 2, "trainable": ["*.experts.*"]}, {"name": "all", "steps": 2}]


def run(name, kind, experts=1, shards=1, stages=()):
    engine = {"kind": kind, "expert_parallel": experts, "context_parallel": shards}
    return json.dumps({"name": name, "engine": engine, "training": TRAINING, "stages": stages})


def half_done(run, name):
    """A copy of a finished run as it stood in the middle."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS}")
    return name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the run of one process: micro batches of one row, MTP, balance loss and router bias."""
    folder = tmp_path_factory.mktemp("experts")
    experts_over_ranks.check_training(folder, run("one", "single"))
    return folder


@pytest.mark.slow
def test_a_layer_over_four_ranks_is_the_layer_alone(four_ranks):
    four_ranks.run("tests.support.experts_over_ranks:check_layer")


@pytest.mark.slow
def test_two_ranks_train_as_one_and_go_on_from_one(folder, two_ranks):
    two_ranks.run(TRAINED, str(folder), run("ddp", "ddp", 2), run("zero1", "zero1", 2),
                  run(half_done(folder / "one", "to_two"), "zero3", 2))
    for name in ("ddp", "zero1", "to_two"):
        assert_same_run(folder / name, folder / "one")
    experts_over_ranks.check_training(folder, run(half_done(folder / "zero1", "to_one"), "single"))
    assert_same_run(folder / "to_one", folder / "one")


@pytest.mark.slow
def test_stages_that_freeze_experts_or_train_nothing_else(folder, two_ranks):
    experts_over_ranks.check_training(folder, run("stages", "single", stages=STAGES))
    two_ranks.run(TRAINED, str(folder), run("stages_ddp", "ddp", 2, stages=STAGES),
                  run("stages_zero3", "zero3", 2, stages=STAGES))
    for name in ("stages_ddp", "stages_zero3"):
        assert_same_run(folder / name, folder / "stages")


@pytest.mark.slow
def test_four_ranks_hold_each_expert_twice(folder, four_ranks):
    """With rows in two shards too."""
    four_ranks.run(TRAINED, str(folder), run("rows_too", "zero2", 2, 2),
                   run(half_done(folder / "one", "to_four"), "zero3", 2))
    for name in ("rows_too", "to_four"):
        assert_same_run(folder / name, folder / "one")


def preset(name, **engine):
    config = load_config("train", [f"model={name}", "data.tokenizer=bytes"])
    return replace(config, engine=engine_config(**engine))


@pytest.mark.parametrize(("experts", "ranks"), [(3, 6), (16, 16), (0, 2)])
def test_a_number_of_ranks_that_does_not_fit_is_refused(experts, ranks):
    with pytest.raises(ConfigError, match=r"engine\.expert_parallel: must divide the 8 experts of a layer"):
        check_process_count(preset("kimi_linear_tiny", kind="ddp", expert_parallel=experts), ranks)


def test_the_names_of_deepspeed_that_sharded_experts_need(monkeypatch):
    """DeepSpeed is pinned; where a new version moves one of these, this fails before a run does."""
    pytest.importorskip("deepspeed")
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import stage3, stage_1_and_2
    from deepspeed.utils import groups

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["deepspeed"] == [f"deepspeed=={metadata.version('deepspeed')}"]
    for name in ("_create_expert_and_data_parallel", "_get_expert_parallel_group", "_get_expert_data_parallel_group"):
        assert callable(getattr(groups, name))
    assert 'f"ep_size_{expert_parallel_size_}"' in inspect.getsource(groups._create_expert_and_data_parallel)

    model = build_model(preset("kimi_linear_tiny"), device="meta")
    experts = expert_parameters(model)
    optimizer = torch.optim.AdamW([{"params": [p for name, p in model.named_parameters() if (name in experts) == split]}
                                   for split in (False, True)])
    monkeypatch.setitem(groups._EXPERT_DATA_PARALLEL_GROUP, zero_experts.group_name(2), None)  # of no process here
    zero_experts.mark(model, optimizer, 2, weights_sharded=False)
    assert {name for name, p in model.named_parameters() if is_moe_param(p)} == set(experts)
    assert [group.get("moe", False) for group in optimizer.param_groups] == [False, True]
    assert sum(isinstance(module, AutoEPMoELayer) for module in model.modules()) == 1
    zero_experts.unmark(model)
    assert not any(isinstance(module, AutoEPMoELayer) for module in model.modules())

    for module, words in ((engine, ("AutoEPMoELayer", "autoep_expert", "ds_zero_placement_family")),
                          (stage3, ("autoep_expert", "ds_zero_partition_group_name")),
                          (stage_1_and_2, ("'moe' in group", "expert_dp_process_group[group['name']]"))):
        source = inspect.getsource(module)
        assert [word for word in words if word not in source] == []


def sent(config, engine="ddp", expert_parallel=1, **plan):
    found = {}
    plan = ParallelPlan(engine=engine_config(engine, expert_parallel=expert_parallel), ranks=64, length=4096,
                        micro_batches=2, **plan)
    for one in step_traffic(config, plan):
        found[one.name, one.kind] = (one.ranks, one.payload)
    return found


def test_what_a_step_sends_by_the_formulas():
    """Kimi Linear: 26 layers of 256 experts, 8 per token, width 2304."""
    config = load_config("train", ["model=kimi_linear_48b", "data.tokenizer=bytes"]).model
    count = count_parameters(config)
    assert count.routed == 26 * 256 * 3 * 2304 * 1024
    assert sent(config)["gradients", "all_reduce"] == (64, 4 * count.total)
    split = sent(config, engine="zero2", expert_parallel=16)
    assert split["gradients", "all_reduce"] == (64, 2 * 4 * (count.total - count.routed))
    assert split["expert gradients", "all_reduce"] == (4, 2 * 4 * count.routed / 16)
    assert split["expert weights", "all_gather"] == (4, 4 * count.routed / 16)
    pairs, visits = 4096 * 8 * 15 / 16, 4096 * 15 * visit_probability(config.feed_forward.routed_experts(), 16)
    # Rows there and back with their gradients, weights and theirs, the numbers of experts, and how many come.
    a_layer = 4 * visits * 2304 * 2 + 3 * pairs * 4 + 15 * 2 * 4
    assert split["expert rows", "all_to_all"] == (16, pytest.approx(26 * 2 * a_layer))
    again = sent(config, expert_parallel=16, activation_checkpointing=True)["expert rows", "all_to_all"][1]
    assert again == pytest.approx(split["expert rows", "all_to_all"][1] * 1.5, rel=1e-3)
    alone = sent(config, engine="zero3", expert_parallel=64)  # nobody else holds these experts
    assert {part for part, _ in alone} == {"weights", "gradients", "expert rows", "router sums"}


@pytest.mark.parametrize(("routing", "ranks"), [
    ({}, 2), ({}, 8), ({"num_groups": 4, "topk_groups": 2}, 2), ({"num_groups": 4, "topk_groups": 2}, 8),
    ({"num_groups": 4, "topk_groups": 3}, 4), ({"num_groups": 2, "topk_groups": 1}, 1)])
def test_the_probability_that_a_rank_has_experts_of_a_token(routing, ranks):
    """By listing every choice of three experts of eight that the groups allow."""
    moe = MoEConfig(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, **routing)
    size, held = 8 // moe.num_groups, 8 // ranks
    met = [any(expert < held for expert in experts)
           for groups in combinations(range(moe.num_groups), moe.topk_groups)
           for experts in combinations([e for e in range(8) if e // size in groups], 3)]
    assert visit_probability(moe.routed_experts(), ranks) == pytest.approx(sum(met) / len(met))


def test_memory_of_a_rank_with_some_of_the_experts():
    whole, split = (rank_memory(preset("kimi_linear_48b", kind="zero1", expert_parallel=n), 64) for n in (1, 16))
    count = count_parameters(preset("kimi_linear_48b").model)
    assert whole.weights - split.weights == pytest.approx(6 * count.routed * 15 / 16)  # fp32, and the copies in bf16
    assert split.optimizer == pytest.approx(whole.optimizer)  # ZeRO divides it by 64 either way
    assert split.activations > whole.activations
