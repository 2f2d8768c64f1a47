"""From the folder of a ladder to everything that it says: losses, differences, laws, projections and verdicts.

The folder is that of a sweep (`hybridlm.sweep.folder`); sweep.json has the ladder's settings and the costs of every
point under `ladder`, and ladder.json what this module makes of the results.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import ConfigError, counted
from hybridlm.files import write_json
from hybridlm.ladder.bootstrap import Bootstrap, bootstrap, curve_points, jackknife
from hybridlm.ladder.law import FREE_MIN_RUNGS, Fit, choose_form, compute_gain, fit_laws
from hybridlm.ladder.measurements import Measurement, Results
from hybridlm.ladder.pilot_report import read_pilot
from hybridlm.ladder.plan import ARCHITECTURE_KEY, RUNG_KEY, LadderPlan, describe_costs
from hybridlm.ladder.request import EXTRAPOLATION_MAX, LadderConfig, check_projections
from hybridlm.ladder.verdict import Comparison, Verdict, compare, judge, project
from hybridlm.sweep.collect import collect
from hybridlm.sweep.folder import read_plan
from hybridlm.sweep.point import SEED_KEY
from hybridlm.sweep.probe_tasks import DECODE_METRIC

LOSS_METRIC = "validation_bits_per_byte"
RESULT_FILE = "ladder.json"
MAX_EPOCHS = 4.0  # repeated tokens are nearly as good as new ones up to here (arXiv 2305.16264)


def describe_ladder(plan: LadderPlan) -> dict[str, Any]:
    """Describe a ladder for sweep.json: its settings, and the costs of every point."""
    return {"settings": to_dict(plan.ladder), "costs": describe_costs(plan.costs)}


def read_ladder(folder: Path) -> tuple[LadderConfig, dict[str, dict[str, Any]]]:
    """Read the settings of a ladder and the costs of its points.

    Args:
        folder: of the ladder.

    Raises:
        ConfigError: there is no ladder.
    """
    plan = read_plan(folder)
    if plan is None or "ladder" not in plan:
        what = "holds no ladder" if plan is None else "holds a sweep that is no ladder"
        raise ConfigError("ladder.dir", what, got=str(folder), expected="the folder of a ladder that has been started",
                          hint="run the ladder first, without --fit-only")
    saved = plan["ladder"]
    return from_dict(LadderConfig, saved["settings"], "ladder"), saved["costs"]


def analyse(folder: Path, ladder: LadderConfig, costs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Collect results, fit, compare and judge; writes results.csv, results.json and ladder.json.

    Args:
        folder: of the ladder.
        ladder: its settings; `fit` and `gate` may differ from those it ran with.
        costs: of every point, of `read_ladder`.

    Returns:
        The content of ladder.json.

    Raises:
        ConfigError: a projection far beyond all points, a form of law that the points cannot support.
    """
    check_projections(ladder.gate, max(cost["compute"] for cost in costs.values()))
    rows = describe_points(folder, ladder, costs)
    pilot = read_pilot(folder)
    rungs = [rung.name for rung in ladder.sizes]
    measured = [_measurement(row) for row in rows if row["loss"] is not None]
    results = Results(measured, rungs, ladder.reference_name)
    report: dict[str, Any] = {
        "ladder": to_dict(ladder), "pilot": None if pilot is None else to_dict(pilot),
        "points": rows, "cells": _cells(results, rows),
        "missing": [f"{row['point']}: {row['status']}" for row in rows if row["loss"] is None],
        "law": None, "comparisons": {}, "gains": {}, "projections": {}, "verdicts": [], "warnings": []}
    report["warnings"] = _warn_of_data(rows)
    others = [name for name in results.architectures if name != results.reference]
    if results.reference not in results.architectures or len(results.rungs) < 2:
        report["warnings"].append("no law is fitted: it needs the reference at two rungs")
    else:
        _analyse_laws(report, results, ladder, others)
    write_json(folder / RESULT_FILE, report)
    return report


def describe_points(folder: Path, ladder: LadderConfig, costs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Collect the points of a ladder with their costs and results; writes results.csv and results.json.

    Args:
        folder: of the ladder, or of its pilot.
        ladder: its settings.
        costs: of every point.

    Returns:
        A row per point; its loss is null unless it has finished with a finite one.
    """
    return [_describe_point(point, costs[point["point"]], ladder) for point in collect(folder)["points"]]


def _analyse_laws(report: dict[str, Any], results: Results, ladder: LadderConfig, others: Sequence[str]) -> None:
    """Fill in the law, and what follows from it for each architecture but the reference."""
    level = ladder.gate.level
    largest = max(each.compute for each in results.measurements)
    smallest = min(each.compute for each in results.measurements)
    report["warnings"] += [f"the projection to {compute:.3g} FLOPs lies {compute / largest:,.0f} times beyond the "
                           "largest compute with results" for compute in ladder.gate.project
                           if compute > EXTRAPOLATION_MAX * largest]
    form, asymptote = choose_form(ladder.fit.form, ladder.fit.asymptote, len(results.rungs),
                                  math.log10(largest / smallest))
    fit = fit_laws(curve_points(results.measurements), form, asymptote)
    draws = bootstrap(results, fit, asymptote, ladder.fit.bootstrap)
    left_out = jackknife(results, fit, asymptote)
    report["law"] = _describe_law(results, fit, draws, asymptote, level)
    report["warnings"] += _warn_of_fit(report["law"], fit, asymptote, len(results.rungs))
    for name in others:
        comparisons = compare(results, fit, name, level)
        projections = project(results, fit, draws, name, ladder.gate.project, level)
        verdict = judge(results, name, comparisons, projections, ladder.gate_rungs, level)
        report["comparisons"][name] = [each.to_dict() for each in comparisons]
        report["projections"][name] = [{**vars(each), "difference": each.difference} for each in projections]
        report["gains"][name] = _describe_gain(results, fit, draws, left_out, name, level)
        report["verdicts"].append(_describe_verdict(verdict))
        report["warnings"] += _warn_of_crossing(name, comparisons)


def _describe_point(point: dict[str, Any], cost: dict[str, Any], ladder: LadderConfig) -> dict[str, Any]:
    """One point with its costs and results; its loss is null unless it has finished with a finite one."""
    metrics = point["metrics"]
    loss = metrics.get(LOSS_METRIC)
    labels = [task.label for task in ladder.probes]
    scores = {name.removeprefix("probe/"): value for name, value in metrics.items()
              if name.startswith("probe/") and name.split("/")[1] in labels and "/accuracy" in name}
    row = {"point": point["point"], "architecture": point["settings"][ARCHITECTURE_KEY],
           "rung": point["settings"][RUNG_KEY], "seed": point["settings"][SEED_KEY], "status": point["status"],
           "loss": loss if loss is not None and math.isfinite(loss) else None, **cost,
           "layers": point["layers"], "changed": point["changed"],
           "tokens_per_second": metrics.get("tokens_per_second"), "mfu": metrics.get("mfu"),
           DECODE_METRIC: metrics.get(DECODE_METRIC), "epochs": metrics.get("epochs"),
           "scores": scores}
    return {**row, "reason": point["reason"], "diverged": point["diverged"]} if "reason" in point else row


def _measurement(row: dict[str, Any]) -> Measurement:
    return Measurement(row["architecture"], row["rung"], row["seed"], row["loss"], row["compute"],
                       row["flops_per_token"], row["tokens_per_second"], row["scores"], row[DECODE_METRIC])


def _cells(results: Results, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Costs and losses of every architecture at every rung, over its seeds."""
    cells = []
    for rung in dict.fromkeys(row["rung"] for row in rows):
        for name in dict.fromkeys(row["architecture"] for row in rows):
            first = next((row for row in rows if (row["rung"], row["architecture"]) == (rung, name)), None)
            if first is None:
                continue
            losses = {str(seed): each.loss for seed, each in sorted(results.cell(name, rung).items())}
            speed = results.speed(name, rung)
            cells.append({
                "rung": rung, "architecture": name, "losses": losses,
                "mean": statistics.fmean(losses.values()) if losses else None,
                "tokens_per_second": speed, "flops_per_second": speed and speed * first["flops_per_token"],
                DECODE_METRIC: results.decode_time(name, rung),
                **{key: first[key] for key in ("parameters", "tokens", "compute", "flops_per_token", "steps", "lr",
                                              "state_bytes", "layers")}})
    return cells


def _describe_law(results: Results, fit: Fit, draws: Bootstrap, asymptote: float | None,
                  level: float) -> dict[str, Any]:
    laws = {name: {**vars(law), "exponent_interval": draws.interval(
        lambda each, name=name: each.laws[name].exponent, level), "asymptote_interval":  # type: ignore[misc]
        None if asymptote is not None else draws.interval(
            lambda each, name=name: each.laws[name].asymptote, level)}  # type: ignore[misc]
        for name, law in fit.laws.items()}
    residuals = [{"architecture": each.architecture, "rung": each.rung, "seed": each.seed, "compute": each.compute,
                  "residual": residual}
                 for each, residual in zip(results.measurements, fit.residuals, strict=True)]
    return {"form": fit.form, "pinned_at": asymptote, "at_bound": fit.at_bound, "laws": laws, "residuals": residuals}


def _describe_gain(results: Results, fit: Fit, draws: Bootstrap, left_out: dict[str, Fit], name: str,
                   level: float) -> dict[str, Any] | None:
    """The one compute-equivalent gain of laws that share asymptote and exponent; None for free ones."""
    if fit.form == "free":
        return None

    def gain(each: Fit) -> float:
        return compute_gain(each.laws[results.reference], each.laws[name], compute=1.0)  # the same at every compute

    return {"gain": gain(fit), "interval": draws.interval(gain, level),
            "without_rung": {rung: gain(each) for rung, each in left_out.items()}}


def _describe_verdict(verdict: Verdict) -> dict[str, Any]:
    return {"architecture": verdict.architecture, "verdict": verdict.status, "reason": verdict.reason,
            "criteria": [vars(each) for each in verdict.criteria]}


def _warn_of_data(rows: Sequence[dict[str, Any]]) -> list[str]:
    epochs = max((row["epochs"] for row in rows if row["epochs"] is not None), default=0.0)
    warnings = []
    if epochs > MAX_EPOCHS:
        warnings.append(f"some text was read {epochs:.1f} times: beyond {MAX_EPOCHS:g} epochs losses fall more slowly "
                        "than with new text")
    single = {row["seed"] for row in rows if row["loss"] is not None}
    if len(single) == 1:
        warnings.append("one seed: nothing is known of the noise, so nothing can be decided")
    return warnings


def _warn_of_fit(law: dict[str, Any], fit: Fit, asymptote: float | None, rungs: int) -> list[str]:
    warnings = []
    if asymptote is not None:
        warnings.append(f"the asymptote is pinned at {asymptote:g}: {counted(rungs, 'rung')} cannot tell it from the "
                        "exponent" if rungs < FREE_MIN_RUNGS else f"the asymptote is pinned at {asymptote:g}")
    if fit.at_bound:
        warnings.append("the fitted asymptote lies at an end of its range: the points do not say where it is")
    wide = [name for name, found in law["laws"].items() if (ends := found["exponent_interval"]) is not None
            and ends[1] - ends[0] > 0.5 * found["exponent"]]
    if wide:
        warnings.append(f"the exponent's interval is wider than half of it ({', '.join(wide)}): do not project")
    return warnings


def _warn_of_crossing(name: str, comparisons: Sequence[Comparison]) -> list[str]:
    clear = [(each.rung, each.difference.interval) for each in comparisons if each.difference.interval is not None]
    better = [rung for rung, (_, high) in clear if high < 0]  # type: ignore[misc]
    worse = [rung for rung, (low, _) in clear if low > 0]  # type: ignore[misc]
    if better and worse:
        return [f"{name} is better at {', '.join(better)} and worse at {', '.join(worse)}: the curves cross"]
    return []
