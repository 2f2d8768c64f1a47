"""Points of a ladder: sizes, matched budgets, carried hyperparameters, and what the user gets wrong."""

import copy
import math
from dataclasses import replace

import pytest

from hybridlm import build_model
from hybridlm.errors import ConfigError
from hybridlm.ladder.plan import _cost, architecture_config, make_ladder_plan, resize_model
from hybridlm.ladder.request import LadderConfig, read_ladder_request
from hybridlm.ladder.rungs import RUNGS, find_rung
from hybridlm.model.cost import forward_flops, training_flops, training_parts
from hybridlm.training.sparse_attention import stage_model
from hybridlm.training.stages import plan_stages

# Query heads and key/value heads of full layers, and of linear ones, by rung.
HEADS = {"r0": (2, 1), "r1": (3, 1), "r2": (4, 1), "r3": (8, 2), "r4": (4, 1), "r5": (8, 2), "r6": (12, 3),
         "r7": (16, 4)}
# Training FLOPs per token without the head in MFLOP, of full attention and of 3:1 KDA, computed by hand from the sizes.
MFLOPS = {"r0": (1.45, 0.93), "r1": (2.60, 1.82), "r2": (4.05, 3.00)}


@pytest.fixture(scope="module")
def plan():
    return make_ladder_plan(read_ladder_request(["ladder=bytes", "ladder.seeds=0,1"]))


def point(plan, name):
    return next(each for each in plan.sweep.points if each.name == name)


def test_every_rung_has_the_heads_of_its_width():
    for model, rungs in (("ladder_bytes", ("r0", "r1", "r2", "r3")), ("ladder_bpe", ("r4", "r5", "r6", "r7"))):
        request = read_ladder_request(["ladder=bytes", f"model={model}"])
        config = architecture_config(request, "kda").model
        for name in rungs:
            sized = config.resize(RUNGS[name].hidden_size, RUNGS[name].num_layers)
            full, kda = sized.mixers["full"], sized.mixers["kda"]
            assert (full.num_heads, full.num_kv_heads) == HEADS[name]
            assert (kda.num_heads, kda.head_dim) == (HEADS[name][0], full.head_dim)


def test_costs_are_those_of_the_sizes(plan):
    for rung, expected in MFLOPS.items():
        for architecture, flops in zip(("full", "kda"), expected, strict=True):
            name = f"{architecture}_{rung}_seed-0"
            cost, head = plan.costs[name], forward_flops(point(plan, name).config.model, 512)["head"]
            assert (cost.flops_per_token - 3 * head) / 1e6 == pytest.approx(flops, rel=0.04)
            assert cost.compute == cost.flops_per_token * cost.tokens


def test_the_dry_run_counts_what_is_built_and_trained(plan):
    for each in plan.sweep.points[::17]:
        cost, model = plan.costs[each.name], build_model(each.config.model, device="meta")
        embedding = model.embed.weight.numel()
        assert cost.parameters == model.num_params() - embedding
        assert cost.tokens == each.tokens == cost.steps * each.config.training.batch_size * 512
        assert cost.steps == each.steps


def test_architectures_of_a_rung_have_equal_budgets_tokens_and_order(plan):
    for rung in ("r0", "r1", "r2"):
        for seed in (0, 1):
            members = [each for each in plan.sweep.points
                       if (each.settings["rung"], each.settings["training.seed"]) == (rung, seed)]
            assert len(members) == 5
            counts = [plan.costs[each.name].parameters for each in members]
            assert max(counts) / min(counts) < 1.03  # 1 % of all parameters, embedding included
            assert len({plan.costs[each.name].tokens for each in members}) == 1
            orders = [(each.config.data, replace(each.config.training, seed=seed), each.config.training.seed)
                      for each in members]
            assert all(order == orders[0] for order in orders)
            per_parameter = plan.costs[members[0].name].tokens / plan.costs[members[0].name].parameters
            assert per_parameter == pytest.approx(10, rel=0.02)


def test_hyperparameters_are_those_of_the_base_and_carried(plan):
    base = point(plan, "full_r0_seed-0")
    assert plan.costs[base.name].lr == base.config.optimizer.lr == 8e-3
    assert base.config.model.logit_multiplier == 1.0
    scales = build_model(base.config.model, device="meta").parameter_scales()
    assert {scale.fan_in for scale in scales.values()} == {1.0}
    wide = point(plan, "kda_r2_seed-0")
    tokens = plan.costs[wide.name].tokens / plan.costs[base.name].tokens
    assert plan.costs[wide.name].lr == pytest.approx(8e-3 * 2**0.5 * tokens**-0.35)
    assert wide.config.model.logit_multiplier == 0.5
    assert wide.config.model.init_std == base.config.model.init_std
    assert len({each.config.training.eval_batches * each.config.training.batch_size for each in plan.sweep.points}) == 1


def test_the_standard_parametrization_falls_with_the_root_of_the_width():
    plan = make_ladder_plan(read_ladder_request(["ladder=tiny", "ladder.parametrization=standard"]))
    small, large = (point(plan, f"full_{rung}_seed-0").config.model for rung in ("t0", "t1"))
    assert large.init_std == pytest.approx(small.init_std * (32 / 48) ** 0.5)
    assert large.logit_multiplier == 1.0
    assert "change no learning rate" in " ".join(plan.sweep.notes)


def test_stages_get_their_part_of_the_tokens(plan):
    sparse = point(plan, "kda_dsa_r1_seed-0")
    dense, rest = plan_stages(sparse.config)
    assert (dense.attention_mode, rest.attention_mode) == ("dense", "sparse")
    assert dense.steps / (dense.steps + rest.steps) == pytest.approx(0.1, abs=0.01)
    assert dense.steps + rest.steps == point(plan, "full_r1_seed-0").steps
    assert dense.lr == rest.lr == plan.costs[sparse.name].lr
    model, cost = sparse.config.model, plan.costs[sparse.name]
    dsa = model.mixers["dsa"]
    by_mode = {mode: training_flops(replace(model, mixers=model.mixers | {
        "dsa": replace(dsa, indexer=replace(dsa.indexer, mode=mode))}), 512) for mode in ("dense", "sparse")}
    assert by_mode["dense"] > by_mode["sparse"] == cost.flops_per_token
    assert cost.compute == pytest.approx(rest.tokens_per_step * (by_mode["dense"] * dense.steps
                                                                 + by_mode["sparse"] * rest.steps), rel=1e-12)
    # A stage that trains the indexers alone computes no logits and no backward of the model, and costs so much less.
    warm = copy.deepcopy(sparse)
    stages = warm.config.recipe.stages
    stages[0] = replace(stages[0], trainable=["*.indexer.*"], loss_weights={"lm": 0})
    parts = training_parts(stage_model(model, dense), 512)
    alone = parts["forward"] - forward_flops(model, 512)["head"] + parts["selector_losses"]
    assert _cost(warm, plan.ladder).compute == pytest.approx(rest.tokens_per_step * (
        alone * dense.steps + by_mode["sparse"] * rest.steps), rel=1e-12)


def test_what_nobody_has_checked_is_said(plan):
    said = " ".join(plan.sweep.notes)
    assert "low-rank gates (kda, kda_dsa)" in said
    assert "indexers, which learn from a loss of their own (kda_dsa)" in said
    assert "(gdn)" not in said


def test_an_architecture_may_have_settings_of_its_own():
    words = ["ladder=tiny", "ladder.architectures.kda.optimizer.lr=2e-3", "ladder.rungs=32x4", "ladder.seeds=3"]
    plan = make_ladder_plan(read_ladder_request(words))
    assert [each.name for each in plan.sweep.points] == ["full_32x4_seed-3", "kda_32x4_seed-3"]
    assert [plan.costs[each.name].lr for each in plan.sweep.points] == [8e-3, 2e-3]


def test_a_rung_may_have_tokens_of_its_own_and_the_base_may_lie_below():
    ladder = LadderConfig(architectures={"full": {"ratio": 0}}, base="r0", parametrization="mup",
                          rungs=[{"hidden_size": 64, "num_layers": 4, "tokens": 10_000, "batch_size": 4}])
    assert ladder.sizes[0].name == "64x4"
    assert (ladder.base_size.name, ladder.gate_rungs, ladder.reference_name) == ("r0", ["64x4"], "full")
    request = read_ladder_request(["ladder=tiny"])
    model = resize_model(architecture_config(request, "full").model, ladder.sizes[0], ladder)
    assert model.parametrization.width_ratio(model.hidden_size) == 2.0
    assert math.isclose(model.logit_multiplier, 0.5)


@pytest.mark.parametrize(("words", "said"), [
    ([], "ladder: is missing"),
    (["ladder=tny"], "did you mean 'tiny'"),
    (["ladder=tiny", "ladder.reference=ful"], "ladder.reference: is no architecture; got 'ful'; expected one of full"),
    (["ladder=tiny", "ladder.rungs=r0,r9"], r"ladder.rungs.1: no such rung; got 'r9'"),
    (["ladder=tiny", "ladder.gate.rungs=r5"], "ladder.gate.rungs: is no rung of this ladder"),
    (["ladder=tiny", "ladder.seeds=0,0"], "ladder.seeds: has a seed twice"),
    (["ladder=tiny", "ladder.fit.level=0.9"], "ladder.fit.level"),
    (["ladder=tiny", "training.steps=5"], "training.steps: is decided by the ladder"),
    (["ladder=tiny", "model.hidden_size=5"], "model.hidden_size: is decided by the ladder"),
    (["ladder=tiny", "ladder.rungs=40x4"], "num_heads"),
    (["ladder=tiny", "ladder.architectures.kda.stages={dense: 0.1}"], "names no stage before the last"),
    (["ladder=tiny", "ladder.architectures.kda.full=dsa", "ladder.architectures.kda.recipe=dsa_scratch"],
     "stages: {dense: 0.1}"),
    (["ladder=tiny", "ladder.seeds="], "ladder.seeds: has no value"),
    (["ladder=tiny", "ladder.slurm.setup=1", "ladder.slurm.setup.first=2"], "'setup' has no keys"),
    (["ladder=tiny", "ladder.gate.project=1e30"], "ladder.gate.project: lies more than 100 times beyond")])
def test_mistakes_are_one_line(words, said):
    with pytest.raises(ConfigError) as caught:
        make_ladder_plan(read_ladder_request(words))
    assert said in str(caught.value)
    assert "ladder.ladder." not in str(caught.value)


def test_keys_of_the_ladder_are_read_as_those_of_a_sweep():
    words = ["+ladder.seeds=0", "++ladder.slurm.partition=gpu", "ladder.slurm.setup.a.b=1", "+training.log_every=5"]
    request = read_ladder_request(["ladder=tiny", *words])
    assert request.ladder.seeds == [0]
    assert request.ladder.slurm == {"partition": "gpu", "setup": {"a": {"b": 1}}}
    assert request.fixed[-1] == "+training.log_every=5"


def test_rungs_by_name_and_by_size():
    assert find_rung("r7").hidden_size == 1024
    with pytest.raises(ConfigError, match="--rung: no such rung; got 'r8'"):
        find_rung("r8", "--rung")
