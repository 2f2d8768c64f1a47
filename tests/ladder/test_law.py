"""Laws are recovered from curves that are known, and refuse what points cannot say."""

import math

import numpy as np
import pytest

from hybridlm.errors import ConfigError
from hybridlm.ladder.bootstrap import bootstrap, curve_points, jackknife, refit
from hybridlm.ladder.law import CurvePoint, Law, choose_form, compute_gain, fit_laws, gain_of_losses
from hybridlm.ladder.measurements import Results
from tests.ladder.curves import BETTER, COMPUTES, EQUAL, MARIN, SEVEN, ladder

THREE = {"full": Law(1.6, 88.32, 0.0941), "kda": Law(1.6, 85.0, 0.0941), "gdn": Law(1.6, 86.5, 0.0941)}


@pytest.mark.parametrize(("computes", "asymptote"), [(SEVEN, None), (SEVEN, 1.6), (COMPUTES, 1.6)])
def test_curves_without_noise_give_their_law(computes, asymptote):
    points = curve_points(ladder(THREE, computes, seeds=1).measurements)
    fit = fit_laws(points, "shared", asymptote)
    for name, law in THREE.items():
        found = fit.laws[name]
        assert (found.asymptote, found.exponent) == pytest.approx((1.6, 0.0941), rel=1e-6)
        assert found.coefficient == pytest.approx(law.coefficient, rel=1e-5)
    assert max(map(abs, fit.residuals)) < 1e-8
    assert not fit.at_bound


def test_an_asymptote_per_architecture_is_found_where_there_are_enough_points():
    laws = {"full": MARIN, "other": Law(1.2, 40.0, 0.07)}
    fit = fit_laws(curve_points(ladder(laws, SEVEN, seeds=1).measurements), "free", None)
    for name, law in laws.items():
        assert vars(fit.laws[name]) == pytest.approx(vars(law), rel=1e-4)


def test_the_published_refit_of_a_law_over_compute_is_reproduced():
    """ArchScale's five losses of a transformer under muP++ lie on one law over its compute (d^6) within 0.2 %."""
    depths, losses = (8, 12, 16, 20, 24), (2.5621, 2.2440, 2.0505, 1.9164, 1.8172)
    points = [CurvePoint("transformer", float(depth) ** 6, loss) for depth, loss in zip(depths, losses, strict=True)]
    fit = fit_laws(points, "shared", None)
    assert max(map(abs, fit.residuals)) < 2e-3
    assert 0 < fit.laws["transformer"].asymptote < min(losses)


def test_the_order_of_points_does_not_matter():
    points = curve_points(ladder(THREE, SEVEN, own=0.004).measurements)
    one, other = fit_laws(points, "shared", None), fit_laws(points[::-1], "shared", None)
    for name in THREE:
        assert vars(one.laws[name]) == pytest.approx(vars(other.laws[name]), rel=1e-5)


@pytest.mark.parametrize(("computes", "noise", "asymptote", "bounds"), [
    (COMPUTES, 0.005, 1.6, (0.0935, 0.0947)), (SEVEN, 0.005, None, (0.093, 0.0955)),
    (SEVEN, 0.005, 1.6, (0.0938, 0.0944))])
def test_noisy_curves_are_recovered_as_well_as_simulations_say(computes, noise, asymptote, bounds):
    exponents = [fit_laws(curve_points(ladder({"full": MARIN}, computes, own=noise, random=seed).measurements),
                          "shared", asymptote).laws["full"].exponent for seed in range(30)]
    inside = [bounds[0] <= exponent <= bounds[1] for exponent in exponents]
    assert sum(inside) >= 26  # of 30; bounds of 95 %


def test_three_rungs_cannot_tell_the_asymptote():
    found = [fit_laws(curve_points(ladder({"full": MARIN}, own=0.005, random=seed).measurements), "shared", None)
             for seed in range(12)]
    asymptotes = [fit.laws["full"].asymptote for fit in found]
    assert max(asymptotes) - min(asymptotes) > 0.8
    assert choose_form("shared", None, 3, 1.1) == ("pinned", 0.0)
    assert choose_form("shared", 1.6, 3, 1.1) == ("pinned", 1.6)
    assert choose_form("shared", None, 5, 6.0) == ("shared", None)
    with pytest.raises(ConfigError, match="5 rungs over 3 decades"):
        choose_form("free", None, 3, 1.1)


def test_an_outlier_moves_the_law_less_than_in_a_fit_of_squares():
    results = ladder({"full": MARIN}, SEVEN, seeds=3)
    points = curve_points(results.measurements)
    spoilt = [CurvePoint(points[0].architecture, points[0].compute, points[0].loss + 0.3), *points[1:]]
    assert fit_laws(spoilt, "shared", 1.6).laws["full"].exponent == pytest.approx(0.0941, rel=2e-3)


def test_losses_at_or_below_the_asymptote_are_refused():
    with pytest.raises(ConfigError, match=r"fit.asymptote: is not below every loss; got 9.0; expected below"):
        fit_laws(curve_points(ladder(EQUAL).measurements), "shared", 9.0)
    with pytest.raises(ConfigError, match="two rungs"):
        fit_laws(curve_points(ladder(EQUAL, {"r0": 1e12}).measurements), "shared", 0.0)


def test_marins_arithmetic():
    better = gain_of_losses(3.5422, 3.5222, 1.6, 0.0941)
    assert better == pytest.approx(1.1163, abs=1e-4)
    assert gain_of_losses(3.5422, 3.5422, 1.6, 0.0941) == 1.0
    # Equal losses with half the FLOPs a token: twice the gain per FLOP.
    assert gain_of_losses(3.5422, 3.5422, 1.6, 0.0941, compute_ratio=2.0) == 2.0
    assert gain_of_losses(3.5, 1.5, 1.6, 0.0941) == math.inf
    assert gain_of_losses(1.5, 3.5, 1.6, 0.0941) == 0.0


def test_gains_of_laws_with_unlike_exponents_depend_on_compute():
    mla, kimi = Law(0.0, 2.3092, 0.0536), Law(0.0, 2.2879, 0.0527)
    assert compute_gain(mla, kimi, 1.76) == pytest.approx(1.178, abs=5e-4)
    assert compute_gain(mla, kimi, 15.1) == pytest.approx(1.136, abs=5e-4)
    assert compute_gain(MARIN, MARIN, 1e18) == pytest.approx(1.0)


def test_bootstrap_intervals_hold_the_truth_and_shrink_with_the_noise():
    widths, hits = {}, 0
    for noise in (0.002, 0.008):
        for seed in range(4):
            results = ladder(BETTER, own=noise, common=0.01, random=seed)
            fit = fit_laws(curve_points(results.measurements), "shared", 1.6)
            draws = bootstrap(results, fit, 1.6, draws=300)
            low, high = draws.interval(lambda each: each.laws["kda"].coefficient / each.laws["full"].coefficient, 0.95)
            hits += low < 86.0 / 88.32 < high
            widths.setdefault(noise, []).append(high - low)
    assert hits >= 6  # of 8: 3 seeds, percentile intervals
    assert sum(widths[0.008]) > 2.5 * sum(widths[0.002])


@pytest.mark.parametrize(("computes", "form", "asymptote"), [
    (COMPUTES, "shared", 1.6), (SEVEN, "shared", None), (SEVEN, "free", None)])
def test_many_fits_at_once_are_those_of_the_optimiser(computes, form, asymptote):
    results = ladder(BETTER, computes, own=0.004)
    points = curve_points(results.measurements)
    fit = fit_laws(points, form, asymptote)
    generator = np.random.default_rng(1)
    log_losses = np.log([[point.loss for point in points]] * 4) + 0.002 * generator.standard_normal((4, len(points)))
    for found, row in zip(refit(points, fit, asymptote, log_losses), log_losses, strict=True):
        redrawn = [CurvePoint(point.architecture, point.compute, math.exp(value))
                   for point, value in zip(points, row, strict=True)]
        alone = fit_laws(redrawn, form, asymptote)
        for name, law in alone.laws.items():
            assert vars(found.laws[name]) == pytest.approx(vars(law), rel=2e-3)


def test_without_a_second_seed_nothing_is_known_of_the_noise():
    results = ladder(BETTER, seeds=1)
    fit = fit_laws(curve_points(results.measurements), "shared", 1.6)
    assert bootstrap(results, fit, 1.6, draws=5).interval(lambda each: each.laws["kda"].exponent, 0.95) is None


def test_leaving_out_a_rung_that_is_off_shows():
    results = ladder(BETTER)
    measured = [each if each.rung != "r2" else type(each)(**{**vars(each), "loss": each.loss + 0.05})
                for each in results.measurements]
    spoilt = Results(measured, results.rungs, "full")
    fits = jackknife(spoilt, fit_laws(curve_points(measured), "shared", 1.6), 1.6)
    assert fits["r2"].laws["full"].exponent == pytest.approx(0.0941, rel=1e-6)
    assert abs(fits["r0"].laws["full"].exponent / 0.0941 - 1) > 0.03
