"""Intervals of laws and projections: the fit is repeated on losses with noise that the seeds have shown.

Deviations of a seed from the mean of its cell are drawn jointly for all architectures, which keeps what pairing
removes, from all rungs together, because one rung has few seeds. They are widened by sqrt(n / (n - 1)), as n values
lie nearer to their own mean than to the true one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hybridlm.ladder.law import HUBER_DELTA, LARGEST_ASYMPTOTE, CurvePoint, Fit, Law, fit_laws
from hybridlm.ladder.measurements import Measurement, Results

Interval = tuple[float, float]
REFIT_STEPS = 40  # Gauss-Newton steps from a fit nearby
REFIT_DAMPING = 1e-6  # of the diagonal of the normal matrix


@dataclass(frozen=True)
class Bootstrap:
    """Fits to redrawn losses; empty where no rung has two seeds, so that nothing is known of the noise."""

    fits: tuple[Fit, ...]

    def interval(self, quantity: Callable[[Fit], float], level: float) -> Interval | None:
        """Percentile interval of a quantity of a fit.

        Args:
            quantity: such as `lambda fit: fit.laws["kda"].exponent`.
            level: probability of the interval.
        """
        if not self.fits:
            return None
        values = np.array([quantity(fit) for fit in self.fits])
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def curve_points(measurements: list[Measurement]) -> list[CurvePoint]:
    """Reduce measurements to the points that a law is fitted to."""
    return [CurvePoint(each.architecture, each.compute, each.loss) for each in measurements]


def bootstrap(results: Results, fit: Fit, asymptote: float | None, draws: int, seed: int = 0) -> Bootstrap:
    """Repeat a fit on redrawn losses.

    Args:
        results: the measurements.
        fit: the fit to them.
        asymptote: value at which it is pinned; None: it was fitted.
        draws: number of repetitions.
        seed: of the random numbers.
    """
    deviations = _deviations(results)
    if not deviations or draws == 0:
        return Bootstrap(())
    random = np.random.default_rng(seed)
    cells = sorted({(each.rung, each.seed) for each in results.measurements})
    chosen = random.integers(len(deviations), size=(draws, len(cells)))
    log_losses = np.empty((draws, len(results.measurements)))
    for column, each in enumerate(results.measurements):
        noise = np.array([row.get(each.architecture, 0.0) for row in deviations])
        mean = results.mean_loss(each.architecture, each.rung) or 1.0
        log_losses[:, column] = math.log(mean) + noise[chosen[:, cells.index((each.rung, each.seed))]]
    return Bootstrap(tuple(refit(curve_points(results.measurements), fit, asymptote, log_losses)))


def refit(points: list[CurvePoint], fit: Fit, asymptote: float | None, log_losses: np.ndarray) -> list[Fit]:
    """Fit the laws to many sets of losses at once, by Gauss-Newton steps with Huber's weights from a fit nearby.

    Args:
        points: the points, whose losses are replaced.
        fit: the fit to them, where the iteration starts.
        asymptote: value at which it is pinned; None: it is fitted.
        log_losses: logarithms of losses, a row per set and a column per point.

    Returns:
        A fit per row, without residuals.
    """
    names = sorted(fit.laws)
    groups = names if fit.form == "free" else ["all"]
    member = np.array([[each.architecture == name for name in names] for each in points], dtype=float)
    group = member if fit.form == "free" else np.ones((len(points), 1))
    log_compute = np.log([each.compute for each in points])
    centre = float(log_compute.mean())
    x = log_compute - centre
    first = [fit.laws[name] for name in (names if fit.form == "free" else names[:1])]
    e = np.tile([law.asymptote for law in first], (len(log_losses), 1))
    a = np.tile([law.exponent for law in first], (len(log_losses), 1))
    log_a = np.tile([math.log(fit.laws[name].coefficient) - fit.laws[name].exponent * centre for name in names],
                    (len(log_losses), 1))
    highest = LARGEST_ASYMPTOTE * np.exp(log_losses.min(1))[:, None]
    for _ in range(REFIT_STEPS):
        log_power = log_a @ member.T - (a @ group.T) * x
        predicted = np.exp(log_power) + e @ group.T
        error = np.log(predicted) - log_losses
        weight = np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(error), 1e-300))
        share = np.exp(log_power) / predicted
        columns = [-(share * x)[:, :, None] * group, share[:, :, None] * member]
        if asymptote is None:
            columns.insert(0, group / predicted[:, :, None])
        jacobian = np.concatenate(columns, axis=2)
        normal = np.einsum("bni,bn,bnj->bij", jacobian, weight, jacobian)
        damping = REFIT_DAMPING * np.einsum("bii->bi", normal)[:, :, None] * np.eye(normal.shape[1])
        slope = np.einsum("bni,bn,bn->bi", jacobian, weight, error)
        step = np.linalg.solve(normal + damping, slope[:, :, None])[:, :, 0]
        if asymptote is None:
            e = np.clip(e - step[:, :len(groups)], 0.0, highest)
            step = step[:, len(groups):]
        a = np.maximum(a - step[:, :len(groups)], 1e-6)
        log_a = log_a - step[:, len(groups):]
    fits = []
    for row in range(len(log_losses)):
        laws = {}
        for index, name in enumerate(names):
            own = index if fit.form == "free" else 0
            exponent = float(a[row, own])
            laws[name] = Law(float(e[row, own]), math.exp(log_a[row, index] + exponent * centre), exponent)
        fits.append(Fit(laws, fit.form, False, ()))
    return fits


def _deviations(results: Results) -> list[dict[str, float]]:
    """Relative deviation of every seed from the mean of its cell, by architecture; one entry per rung and seed."""
    found = []
    for rung in results.rungs:
        cells = {name: results.cell(name, rung) for name in results.architectures}
        for seed in sorted({seed for cell in cells.values() for seed in cell}):
            row = {}
            for name, cell in cells.items():
                if seed in cell and len(cell) > 1:
                    mean = results.mean_loss(name, rung) or 0.0
                    row[name] = math.log(cell[seed].loss / mean) * math.sqrt(len(cell) / (len(cell) - 1))
            if len(row) == sum(len(cell) > 0 for cell in cells.values()):
                found.append(row)
    return found


def jackknife(results: Results, fit: Fit, asymptote: float | None) -> dict[str, Fit]:
    """Fits without one rung each, by the rung that was left out; none where two rungs or fewer would be too few."""
    found = {}
    for rung in results.rungs:
        kept = [each for each in results.measurements if each.rung != rung]
        same = {each.architecture for each in kept} == set(fit.laws)
        if len(results.rungs) > 2 and same:
            found[rung] = fit_laws(curve_points(kept), fit.form, asymptote)
    return found
