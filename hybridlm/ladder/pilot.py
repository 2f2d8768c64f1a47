"""The pilot of a ladder: learning rates around a centre at the smallest rung, and the best of them per architecture.

A pilot is a ladder of its own in the folder `pilot` of the ladder, with an architecture per learning rate, so it runs,
stops and goes on as one. pilot.json beside it has what came out; the rungs of the ladder then train with the best
rates. A pilot around another centre adds its rates to those that were tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybridlm.config.serialization import to_dict
from hybridlm.files import write_json
from hybridlm.ladder.pilot_report import (
    PILOT_FILE,
    RATE_KEY,
    PilotReport,
    RateResult,
    TunedArchitecture,
    lower_rates,
    optimizer_settings,
    read_own_pilot,
)
from hybridlm.ladder.request import LadderConfig, LadderRequest
from hybridlm.optimizers import OptimizerConfig
from hybridlm.sweep.folder import read_plan

PILOT_FOLDER = "pilot"


@dataclass(frozen=True)
class TriedRate:
    """One architecture of a pilot: an architecture of the ladder at one learning rate.

    Args:
        name: in the pilot.
        architecture: in the ladder.
        rate: the learning rate.
    """

    name: str
    architecture: str
    rate: float


def plan_rates(ladder: LadderConfig, centres: dict[str, float]) -> list[TriedRate]:
    """List the learning rates that a pilot tries, those of earlier pilots in the folder included.

    Args:
        ladder: its architectures and factors.
        centres: `optimizer.lr` of each architecture, before any pilot.

    Raises:
        ConfigError: an earlier pilot in the folder was meant for another rung, base or parametrization.

    >>> ladder = LadderConfig(architectures={"kda": {}}, rungs=["r0"], dir="/nowhere")
    >>> [tried.name for tried in plan_rates(ladder, {"kda": 0.008})]
    ['kda_lr-0.002', 'kda_lr-0.004', 'kda_lr-0.008', 'kda_lr-0.016', 'kda_lr-0.032']
    """
    found = []
    for name, centre in centres.items():
        # Six digits name a rate, so that the same one is found again around another centre.
        rates = {float(f"{rate:.6g}") for rate in (*(centre * factor for factor in ladder.pilot.factors),
                                                   *_tried_before(ladder, name))}
        found += [TriedRate(f"{name}_lr-{rate:g}", name, rate) for rate in sorted(rates)]
    return found


def pilot_request(request: LadderRequest, tried: Sequence[TriedRate]) -> LadderRequest:
    """The request of the pilot: the smallest rung of a ladder, with an architecture per learning rate.

    Args:
        request: that of the ladder.
        tried: of `plan_rates`.
    """
    ladder = request.ladder
    architectures = {each.name: {**ladder.architectures[each.architecture], RATE_KEY: each.rate} for each in tried}
    reference = next(each.name for each in tried if each.architecture == ladder.reference_name)
    own = replace(ladder, name=f"{ladder.name}-pilot", architectures=architectures, reference=reference,
                  rungs=ladder.rungs[:1], base=to_dict(ladder.base_size),
                  seeds=ladder.pilot.seeds or ladder.seeds[:1], probes=[], decode_context=None,
                  dir=str(ladder.folder / PILOT_FOLDER), gate=replace(ladder.gate, rungs=None, project=[]))
    return replace(request, ladder=own)


def judge_pilot(ladder: LadderConfig, optimizers: Mapping[str, OptimizerConfig], tried: Sequence[TriedRate],
                points: Sequence[dict[str, Any]]) -> PilotReport:
    """Choose the best rate of every architecture, and write pilot.json.

    Args:
        ladder: the ladder, not its pilot.
        optimizers: of each architecture, before any pilot.
        tried: of `plan_rates`.
        points: rows of the pilot's results: architecture, loss (null where there is none), status and `diverged`.

    Returns:
        The content of pilot.json: by architecture the losses of all rates, the best one, and whether it lies at an edge
        of what was tried. A rate at which a training diverged has the loss null. Architectures of earlier pilots stay.
    """
    before = _saved(ladder)
    current = {name: _judge(optimizer, [each for each in tried if each.architecture == name], points, before.get(name))
               for name, optimizer in optimizers.items()}
    report = PilotReport(rung=ladder.sizes[0], base=ladder.base_size, parametrization=ladder.parametrization,
                         seeds=ladder.pilot.seeds or ladder.seeds[:1], architectures={**before, **current},
                         warnings=[warning for name, found in current.items()
                                   for warning in _warn(name, found, ladder.pilot.factors)])
    ladder.folder.mkdir(parents=True, exist_ok=True)
    write_json(ladder.folder / PILOT_FILE, to_dict(report))
    return report


def _judge(optimizer: OptimizerConfig, tried: Sequence[TriedRate], points: Sequence[dict[str, Any]],
           before: TunedArchitecture | None) -> TunedArchitecture:
    """Judge the results of one architecture, whose rates in `tried` ascend."""
    rates, missing = [], []
    for each in tried:
        rows = [row for row in points if row["architecture"] == each.name]
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        diverged = [row for row in rows if row["loss"] is None and row.get("diverged")]
        missing += [f"{row['point']}: {row['status']}" for row in rows if row["loss"] is None and row not in diverged]
        rates.append(RateResult(lr=each.rate, loss=None if diverged or not losses else statistics.fmean(losses),
                                losses=losses, diverged=len(diverged)))
    known = [(row.loss, row.lr) for row in rates if row.loss is not None]
    best = min(known)[1] if known else None
    centres = [] if before is None else [centre for centre in before.centres if centre != optimizer.lr]
    return TunedArchitecture(optimizer=optimizer_settings(optimizer), centres=[*centres, optimizer.lr], rates=rates,
                             best=best, at_edge=best is not None and best in (rates[0].lr, rates[-1].lr),
                             missing=missing)


def _warn(name: str, found: TunedArchitecture, factors: Sequence[float]) -> list[str]:
    """Say that the best rate lies at an edge or that there is none, and how the pilot goes on."""
    if found.best is None:
        return [] if found.missing else [f"{name} diverged at every rate: {lower_rates(name, found)}"]
    if not found.at_edge:
        return []
    centre = found.best
    if found.best == found.rates[0].lr and min(factors) >= 1:
        centre /= max(factors)
    elif found.best == found.rates[-1].lr and max(factors) <= 1:
        centre /= min(factors)
    return [f"the best rate of {name}, {found.best:g}, is at the edge of those that were tried: add "
            f"ladder.architectures.{name}.{RATE_KEY}={centre:g} to the command of the pilot"]


def _tried_before(ladder: LadderConfig, name: str) -> list[float]:
    """Learning rates of an architecture in pilot.json, and in the folder of a pilot that has not written it."""
    saved = _saved(ladder)
    rates = [row.lr for row in saved[name].rates] if name in saved else []
    plan = read_plan(ladder.folder / PILOT_FOLDER)
    if plan is not None:
        rates += [words[RATE_KEY] for tried, words in plan["ladder"]["settings"]["architectures"].items()
                  if tried.rpartition("_lr-")[0] == name]
    return rates


def _saved(ladder: LadderConfig) -> dict[str, TunedArchitecture]:
    """Read the results of earlier pilots in the folder, by architecture."""
    report = read_own_pilot(ladder)
    return {} if report is None else report.architectures
