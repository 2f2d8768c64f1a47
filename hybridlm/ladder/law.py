"""Laws of loss over compute, L = E + A C^-a, fitted to the points of a ladder.

All architectures share the asymptote E and the exponent a, and each has its own A, so that two of them differ by one
number, the compute-equivalent gain (A_b / A_v)^(1/a). With few rungs the asymptote cannot be told from the exponent: it
is pinned below FREE_MIN_RUNGS rungs, at 0 unless a value is given. The fit minimises Huber's loss of differences of
log L (Hoffmann et al., arXiv 2203.15556, appendix D.3). For every E of a scan the other parameters come from a linear
fit of log(L - E); the best of these starts scipy's `least_squares`, because the optimiser moves exponents (Besiroglu et
al., arXiv 2404.10102).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from hybridlm.errors import ConfigError

HUBER_DELTA = 1e-3  # of log L: larger differences count linearly
SCANNED_ASYMPTOTES = 40  # values of E between 0 and the smallest loss
LARGEST_ASYMPTOTE = 0.999  # of the smallest loss
FREE_MIN_RUNGS = 5  # for an asymptote that is fitted
FREE_MIN_DECADES = 3.0  # of compute, for an asymptote per architecture
BOUND_FRACTION = 0.005  # of the smallest loss: an asymptote so near to an end of its range is at the end


@dataclass(frozen=True)
class Law:
    """L = asymptote + coefficient * compute^-exponent.

    >>> law = Law(asymptote=1.0, coefficient=10.0, exponent=0.1)
    >>> round(law.loss(1e10), 6), round(law.compute(2.0) / 1e10, 6)
    (2.0, 1.0)
    """

    asymptote: float
    coefficient: float
    exponent: float

    def loss(self, compute: float) -> float:
        """Loss after `compute` FLOPs."""
        return float(self.asymptote + self.coefficient * compute**-self.exponent)

    def compute(self, loss: float) -> float:
        """FLOPs that a loss takes; infinite at or below the asymptote."""
        if loss <= self.asymptote:
            return math.inf
        return float((self.coefficient / (loss - self.asymptote)) ** (1.0 / self.exponent))


def compute_gain(reference: Law, law: Law, compute: float) -> float:
    """Compute-equivalent gain: the FLOPs with which the reference reaches what `law` reaches at `compute`, over these.

    >>> mla, kimi = Law(0.0, 2.3092, 0.0536), Law(0.0, 2.2879, 0.0527)  # arXiv 2510.26692, in PFLOP/s-days
    >>> round(compute_gain(mla, kimi, 1.76), 3), round(compute_gain(mla, kimi, 15.1), 3)
    (1.178, 1.136)
    """
    return reference.compute(law.loss(compute)) / compute


def gain_of_losses(reference_loss: float, loss: float, asymptote: float, exponent: float,
                   compute_ratio: float = 1.0) -> float:
    """Compute-equivalent gain of one measured loss over another, by a law's asymptote and exponent.

    Args:
        reference_loss: what the reference reached.
        loss: what the architecture reached.
        asymptote: E of the law.
        exponent: a of the law.
        compute_ratio: FLOPs of the reference's run over those of the architecture's.

    Returns:
        FLOPs that the reference would have needed over those of the architecture; infinite below the asymptote.
    """
    if loss <= asymptote:
        return math.inf
    if reference_loss <= asymptote:
        return 0.0
    return float(((reference_loss - asymptote) / (loss - asymptote)) ** (1.0 / exponent) * compute_ratio)


@dataclass(frozen=True)
class CurvePoint:
    """One finished run: what a law is fitted to."""

    architecture: str
    compute: float
    loss: float


@dataclass(frozen=True)
class Fit:
    """Laws by architecture, and how they were found.

    Args:
        laws: by architecture; with a shared form all have one asymptote and one exponent.
        form: shared, pinned or free.
        at_bound: whether a fitted asymptote lies at an end of its range, so that the data do not say where it is.
        residuals: log of the measured over the fitted loss, in the order of the points.
    """

    laws: dict[str, Law]
    form: str
    at_bound: bool
    residuals: tuple[float, ...]


def choose_form(form: str, asymptote: float | None, rungs: int, decades: float) -> tuple[str, float | None]:
    """Decide how the asymptote is treated, by the number of rungs.

    Args:
        form: what was asked for: shared, pinned or free.
        asymptote: a value for it, or None.
        rungs: number of sizes with results.
        decades: log10 of the largest over the smallest compute.

    Returns:
        The form, and the value at which the asymptote is pinned; None where it is fitted.

    Raises:
        ConfigError: a free form that the points cannot support.
    """
    if form == "free":
        if rungs < FREE_MIN_RUNGS or decades < FREE_MIN_DECADES:
            raise ConfigError("ladder.fit.form", "needs more points: asymptote and exponent of each architecture "
                              "cannot be told apart", got=f"free, {rungs} rungs over {decades:.1f} decades of compute",
                              expected=f"{FREE_MIN_RUNGS} rungs over {FREE_MIN_DECADES:g} decades",
                              hint="ladder.fit.form=shared")
        return "free", asymptote
    if asymptote is not None:
        return "pinned", asymptote
    return ("pinned", 0.0) if form == "pinned" or rungs < FREE_MIN_RUNGS else ("shared", None)


def fit_laws(points: Sequence[CurvePoint], form: str, asymptote: float | None) -> Fit:
    """Fit laws to points.

    Args:
        points: at least two amounts of compute, of any architectures, in any order.
        form: `free` fits every architecture alone; else all share asymptote and exponent.
        asymptote: value at which it is pinned; None fits it.

    Raises:
        ConfigError: a loss that is not above the pinned asymptote, or fewer than two amounts of compute.
    """
    if form == "free":
        names = list(dict.fromkeys(point.architecture for point in points))
        fits = {name: fit_laws([each for each in points if each.architecture == name], "shared", asymptote)
                for name in names}
        laws = {name: fit.laws[name] for name, fit in fits.items()}
        return Fit(laws, form, any(fit.at_bound for fit in fits.values()), _residuals(points, laws))
    names = sorted({point.architecture for point in points})
    log_compute = np.log([point.compute for point in points])
    log_loss = np.log([point.loss for point in points])
    if len(set(log_compute.round(9))) < 2:
        raise ConfigError("ladder.fit", "needs results at two rungs", got=f"{len(points)} points of one size")
    smallest = float(np.exp(log_loss.min()))
    if asymptote is not None and asymptote >= smallest:
        raise ConfigError("ladder.fit.asymptote", "is not below every loss", got=asymptote,
                          expected=f"below {smallest:.4g}")
    member = np.array([[point.architecture == name for name in names] for point in points], dtype=float)
    centre = float(log_compute.mean())
    x = log_compute - centre
    scan = ([asymptote] if asymptote is not None
            else list(np.linspace(0.0, LARGEST_ASYMPTOTE * smallest, SCANNED_ASYMPTOTES)))
    begin = min((_linear_start(value, x, log_loss, member) for value in scan), key=lambda each: each[0])[1]
    highest = LARGEST_ASYMPTOTE * smallest
    begin[0] = min(begin[0], highest * (1 - 1e-9)) if asymptote is None else begin[0]
    free = slice(0, None) if asymptote is None else slice(1, None)

    def split(theta: np.ndarray) -> tuple[float, float, np.ndarray]:
        whole = begin.copy()
        whole[free] = theta
        return whole[0], whole[1], whole[2:]

    def residuals(theta: np.ndarray) -> np.ndarray:
        e, a, log_a = split(theta)
        return _log_sum(e, member @ log_a - a * x) - log_loss

    def jacobian(theta: np.ndarray) -> np.ndarray:
        e, a, log_a = split(theta)
        log_power = member @ log_a - a * x
        log_sum = _log_sum(e, log_power)
        share = np.exp(log_power - log_sum)
        return np.column_stack([np.exp(-log_sum), -share * x, share[:, None] * member])[:, free]

    low = np.array([0.0, 1e-6, *[-np.inf] * len(names)])[free]
    high = np.array([highest, np.inf, *[np.inf] * len(names)])[free]
    inside = np.clip(begin[free], low + 1e-12, high - 1e-12)
    found = least_squares(residuals, inside, jacobian, bounds=(low, high), loss="huber", f_scale=HUBER_DELTA,
                          x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=400)
    e, a, log_a = split(found.x)
    laws = {name: Law(float(e), math.exp(value + a * centre), float(a))
            for name, value in zip(names, log_a, strict=True)}
    at_bound = asymptote is None and not BOUND_FRACTION * smallest < e < highest - BOUND_FRACTION * smallest
    return Fit(laws, "shared" if asymptote is None else "pinned", at_bound, _residuals(points, laws))


def _log_sum(asymptote: float, log_power: np.ndarray) -> np.ndarray:
    """log(asymptote + exp(log_power)), also where the power overflows in a step that goes too far."""
    return log_power if asymptote == 0 else np.logaddexp(math.log(asymptote), log_power)


def _linear_start(asymptote: float, x: np.ndarray, log_loss: np.ndarray,
                  member: np.ndarray) -> tuple[float, np.ndarray]:
    """Squared error of log L, and (E, a, log A of each architecture), of the linear fit of log(L - E)."""
    target = np.log(np.exp(log_loss) - asymptote)
    solution = np.linalg.lstsq(np.column_stack([-x, member]), target, rcond=None)[0]
    a, log_a = max(float(solution[0]), 1e-3), solution[1:]
    error = np.log(asymptote + np.exp(member @ log_a - a * x)) - log_loss
    return float(error @ error), np.array([asymptote, a, *log_a])


def _residuals(points: Sequence[CurvePoint], laws: dict[str, Law]) -> tuple[float, ...]:
    return tuple(math.log(point.loss / laws[point.architecture].loss(point.compute)) for point in points)
