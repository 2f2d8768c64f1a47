"""Differences are paired, verdicts say what the data decide, and why."""

import math

import pytest

from hybridlm.ladder.bootstrap import bootstrap, curve_points
from hybridlm.ladder.law import Law, fit_laws
from hybridlm.ladder.measurements import Measurement, Results
from hybridlm.ladder.verdict import compare, judge, project
from tests.ladder.curves import BETTER, EQUAL, MARIN, ladder

GATE = ("r1", "r2")


def verdict_of(results, *, projected=(1e15,), name="kda"):
    fit = fit_laws(curve_points(results.measurements), "shared", 1.6)
    draws = bootstrap(results, fit, 1.6, draws=300)
    comparisons = compare(results, fit, name, 0.95)
    projections = project(results, fit, draws, name, projected, 0.95)
    return judge(results, name, comparisons, projections, GATE, 0.95), comparisons


def test_equal_curves_have_gain_one_and_are_undecided():
    found, comparisons = verdict_of(ladder(EQUAL, common=0.02, own=0.004, random=2))
    assert found.status == "undecided"
    assert "loss:" in found.reason
    assert all(abs(math.log(each.gain)) < 0.1 for each in comparisons)
    exact = compare(ladder(EQUAL), fit_laws(curve_points(ladder(EQUAL).measurements), "shared", 1.6), "kda", 0.95)
    assert [each.gain for each in exact] == pytest.approx([1.0] * 3)


def test_a_better_architecture_passes_and_a_worse_one_fails():
    better = ladder(BETTER, common=0.02, own=0.003)
    found, comparisons = verdict_of(better)
    assert found.status == "passes"
    assert [each.name for each in found.criteria] == ["loss", "speed-up", "projection"]
    assert all(each.gain > 1 for each in comparisons)
    swapped = Results(better.measurements, better.rungs, "kda")
    fit = fit_laws(curve_points(swapped.measurements), "shared", 1.6)
    worse = judge(swapped, "full", compare(swapped, fit, "full", 0.95), [], GATE, 0.95)
    assert worse.status == "fails"


def test_pairing_removes_what_seeds_share():
    results = ladder(BETTER, common=0.05, own=0.001)
    paired = results.differences("kda", 0.95)["r1"]
    assert paired.half_width < 0.01
    assert paired.interval[1] < 0
    shifted = [Measurement(**{**vars(each), "seed": (each.seed + 1) % 3 if each.architecture == "kda" else each.seed})
               for each in results.measurements]
    assert Results(shifted, results.rungs, "full").differences("kda", 0.95)["r1"].half_width > 0.03


def test_slower_training_undoes_a_gain():
    slow, comparisons = verdict_of(ladder(BETTER, own=0.001, speeds={"full": 1000.0, "kda": 500.0}))
    assert slow.status == "fails"
    assert "speed-up" in slow.reason
    assert comparisons[0].speed_up == pytest.approx(0.5 * comparisons[0].gain)
    faster = compare(ladder(EQUAL, speeds={"full": 1000.0, "kda": 1100.0}),
                     fit_laws(curve_points(ladder(EQUAL).measurements), "shared", 1.6), "kda", 0.95)
    assert faster[0].speed_up == pytest.approx(1.10)


def test_unlike_flops_per_token_count_in_gain_and_speed():
    """Half the FLOPs a token at the same tokens and tokens/s: twice the gain per FLOP, half the FLOP/s, no speed-up."""
    results = ladder(EQUAL, flops={"full": 2e6, "kda": 1e6})
    measured = [Measurement(**{**vars(each), "compute": each.compute * each.flops_per_token / 2e6, "loss": loss})
                for each in results.measurements for loss in [MARIN.loss(each.compute)]]
    results = Results(measured, results.rungs, "full")
    found = compare(results, fit_laws(curve_points(measured), "shared", 1.6), "kda", 0.95)
    assert [each.gain for each in found] == pytest.approx([2.0] * 3)
    assert [each.speed_up for each in found] == pytest.approx([1.0] * 3)


def test_one_seed_decides_nothing():
    found, comparisons = verdict_of(ladder(BETTER, seeds=1))
    assert found.status == "undecided"
    assert "one seed" in found.reason
    assert comparisons[0].difference.interval is None


def test_missing_and_broken_points_are_left_out():
    results = ladder(BETTER, own=0.001)
    kept = [each for each in results.measurements if (each.architecture, each.rung) != ("kda", "r2")]
    found, comparisons = verdict_of(Results(kept, results.rungs, "full"))
    assert [each.rung for each in comparisons] == ["r0", "r1"]
    assert found.status == "undecided"
    assert "not measured at r2" in found.reason
    broken = [Measurement(**{**vars(each), "loss": math.nan}) if each.seed == 2 else each
              for each in results.measurements]
    again = Results(broken, results.rungs, "full")
    assert {each.seed for each in again.measurements} == {0, 1}
    assert len(again.paired("kda", "r0")) == 2


def test_a_probe_that_is_worse_fails_the_gate():
    laws = {"full": MARIN, "kda": Law(1.6, 80.0, 0.0941)}
    scores = {"full": (1.0, 0.99, 1.0), "kda": (0.5, 0.45, 0.55)}
    measured = [Measurement(**{**vars(each), "scores": {"mqar": scores[each.architecture][each.seed]}})
                if each.rung == "r2" else each for each in ladder(laws, own=0.001).measurements]
    found, _ = verdict_of(Results(measured, ["r0", "r1", "r2"], "full"))
    assert found.status == "fails"
    assert "mqar: accuracy -0.50, -0.54, -0.45 at r2" in found.reason
