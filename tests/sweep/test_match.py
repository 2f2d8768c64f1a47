"""Equal budgets within 1 %, by the smallest change; what cannot be is one line."""

import pytest

from hybridlm.cli import main
from hybridlm.model.cost import count_parameters, decode_state_bytes, training_flops
from hybridlm.run_config import load_model_config
from hybridlm.sweep.match import match_model
from hybridlm.sweep.plan import make_plan

BASE = ["model=hybrid_tiny", "model.schedule.linear=kda,lightning"]
BUDGETS = {"params": lambda model: count_parameters(model).total_with_mtp,
           "active": lambda model: count_parameters(model).active_with_head,
           "flops": lambda model: training_flops(model, 512),
           "state": lambda model: decode_state_bytes(model, 1024)}


@pytest.mark.parametrize("match", BUDGETS)
def test_every_point_has_the_budget_of_the_reference(match):
    words = ["model.schedule.ratio=1,3"] if match != "state" else [
        "model.schedule.ratio=inf", "model.schedule.linear=kda,gdn", "model.mixers.gdn.num_heads=2"]
    plan = make_plan([*BASE, *words, f"sweep.match={match}", "sweep.state_context=1024"])
    budgets = [BUDGETS[match](point.config.model) for point in plan.points]
    assert plan.points[0].changed == {}
    assert all(abs(budget / budgets[0] - 1) <= 0.01 for budget in budgets), budgets
    changed = {key for point in plan.points for key in point.changed}
    allowed = "model.mixers." if match == "state" else ("model.feed_forward.", "model.hidden_size")
    assert changed
    assert all(key.startswith(allowed) for key in changed), changed


def test_mixers_that_the_model_does_not_define_come_from_their_presets():
    plan = make_plan(["model=kimi_linear_tiny", "model.schedule.linear=kda,gdn", "model.schedule.ratio=1,3,inf",
                      "sweep.match=params"])
    assert [point.name for point in plan.points][3:] == ["linear-gdn_ratio-1", "linear-gdn_ratio-3",
                                                         "linear-gdn_ratio-inf"]
    budgets = [BUDGETS["params"](point.config.model) for point in plan.points]
    assert all(abs(budget / budgets[0] - 1) <= 0.01 for budget in budgets), budgets
    kda, gdn = (plan.points[index].config.model.mixers[name] for index, name in ((0, "kda"), (3, "gdn")))
    assert (gdn.num_heads, gdn.head_dim) == (kda.num_heads, kda.head_dim)


def test_the_reference_can_be_any_point_and_changes_are_listed():
    plan = make_plan(["model=hybrid_tiny", "model.schedule.ratio=0,3", "sweep.match=params", "sweep.reference=ratio-3"])
    full, hybrid = plan.points
    assert hybrid.changed == {}
    before, after = full.changed["model.feed_forward.moe_intermediate_size"]
    assert before == 32 < after == full.config.model.feed_forward.moe_intermediate_size


def test_a_wide_model_keeps_its_width_and_gets_a_round_one():
    model = load_model_config("hybrid_1b", ["model.schedule.linear=lightning"])
    target = 1.07 * BUDGETS["params"](model)
    changed = match_model(model, BUDGETS["params"], target, "params")
    assert changed.hidden_size == model.hidden_size
    assert changed.feed_forward.moe_intermediate_size % 8 == 0
    assert abs(BUDGETS["params"](changed) / target - 1) <= 0.01


def test_written_out_widths_beside_the_experts_keep_their_proportion():
    model = load_model_config("hybrid_tiny", ["model.feed_forward.num_shared_experts=1", "model.mtp.depth=1",
                                              "model.feed_forward.shared_intermediate_size=64"])
    changed = match_model(model, BUDGETS["params"], 2 * BUDGETS["params"](model), "params").feed_forward
    assert changed.shared_intermediate_size == 2 * changed.moe_intermediate_size


def test_points_that_cannot_match_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model=hybrid_tiny", "model.schedule.ratio=0,inf", "sweep.match=state"]
    assert main(["sweep", *words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    for part in ("ratio-inf cannot have the bytes of decode state of ratio-0 within 1 %", "16,777,216",
                 "sweep.match=none"):
        assert part in line
    assert list(tmp_path.iterdir()) == []
