"""The pilot of a ladder: learning rates around a centre at the smallest rung, and the best of them per architecture.

A pilot is a ladder of its own in the folder `pilot` of the ladder, with an architecture per learning rate, so it runs,
stops and goes on as one. pilot.json beside it has what came out; the rungs of the ladder then train with the best
rates. A pilot around another centre adds its rates to those that were tried.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridlm.config.serialization import to_dict
from hybridlm.errors import ConfigError
from hybridlm.files import write_json
from hybridlm.ladder.request import LadderConfig, LadderRequest

PILOT_FOLDER = "pilot"
PILOT_FILE = "pilot.json"
RATE_KEY = "optimizer.lr"
DIVERGED = ("the run diverged", "were not finite")  # in the reasons of trainings whose loss was not finite


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

    >>> ladder = LadderConfig(architectures={"kda": {}}, rungs=["r0"], dir="/nowhere")
    >>> [tried.name for tried in plan_rates(ladder, {"kda": 0.008})]
    ['kda_lr-0.002', 'kda_lr-0.004', 'kda_lr-0.008', 'kda_lr-0.016', 'kda_lr-0.032']
    """
    saved = _read(ladder)
    found = []
    for name, centre in centres.items():
        before = saved.get("architectures", {}).get(name, {}).get("rates", [])
        # Six digits name a rate, so that the same one is found again around another centre.
        rates = {float(f"{rate:.6g}") for rate in (*(centre * factor for factor in ladder.pilot.factors),
                                                   *(row["lr"] for row in before))}
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


def judge_pilot(ladder: LadderConfig, tried: Sequence[TriedRate], points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Choose the best rate of every architecture, and write pilot.json.

    Args:
        ladder: the ladder, not its pilot.
        tried: of `plan_rates`.
        points: rows of the pilot's results: architecture, loss (null where there is none), status and reason.

    Returns:
        The content of pilot.json: by architecture the losses of all rates, the best one, and whether it lies at an edge
        of what was tried. A rate at which a training diverged has the loss null.
    """
    report: dict[str, Any] = {"rung": ladder.sizes[0].name, "seeds": ladder.pilot.seeds or ladder.seeds[:1],
                              "architectures": {}, "missing": [], "warnings": []}
    for each in tried:
        rows = [row for row in points if row["architecture"] == each.name]
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        diverged = [row for row in rows if row["loss"] is None
                    and any(text in row.get("reason", "") for text in DIVERGED)]
        report["missing"] += [f"{row['point']}: {row['status']}" for row in rows
                              if row["loss"] is None and row not in diverged]
        found = report["architectures"].setdefault(each.architecture, {"rates": []})
        found["rates"].append({"lr": each.rate, "loss": None if diverged or not losses else statistics.fmean(losses),
                               "losses": losses, "diverged": len(diverged)})
    for name, found in report["architectures"].items():
        known = [row for row in found["rates"] if row["loss"] is not None]
        best = min(known, key=lambda row: row["loss"], default=None)
        found["best"] = None if best is None else best["lr"]
        found["at_edge"] = best is not None and best in (found["rates"][0], found["rates"][-1])
        if found["at_edge"]:
            report["warnings"].append(
                f"the best rate of {name}, {found['best']:g}, is at the edge of those that were tried: add "
                f"ladder.architectures.{name}.{RATE_KEY}={found['best']:g} to the command of the pilot")
    ladder.folder.mkdir(parents=True, exist_ok=True)
    write_json(ladder.folder / PILOT_FILE, report)
    return report


def best_rates(ladder: LadderConfig) -> dict[str, float]:
    """The best learning rate of each architecture by the pilot in the ladder's folder; empty without one.

    Raises:
        ConfigError: the pilot has not finished, so that its best rates may not be the best.
    """
    if not ladder.pilot.use:
        return {}
    saved = _read(ladder)
    if saved.get("missing"):
        raise ConfigError("ladder.dir", "holds a pilot that has not finished", got=saved["missing"][0],
                          hint="go on with it (--pilot), or train without it: ladder.pilot.use=false")
    found = saved.get("architectures", {})
    return {name: row["best"] for name, row in found.items()
            if name in ladder.architectures and row.get("best") is not None}


def read_pilot(folder: Path) -> dict[str, Any] | None:
    """The content of pilot.json in the folder of a ladder; None where there was no pilot.

    Raises:
        ConfigError: a file that no pilot wrote.
    """
    file = folder / PILOT_FILE
    if not file.exists():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        [math.isfinite(row["lr"]) for found in data["architectures"].values() for row in found["rates"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("ladder.dir", "holds a pilot that cannot be read", got=str(file),
                          hint="delete it: the same command with --pilot writes it again") from None
    return data


def _read(ladder: LadderConfig) -> dict[str, Any]:
    return read_pilot(ladder.folder) or {}


def describe_use(ladder: LadderConfig) -> list[str]:
    """Say which learning rates come from the pilot."""
    rates = best_rates(ladder)
    if not rates:
        return []
    listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return [f"learning rates of the pilot: {listed} (ladder.pilot.use=false trains with optimizer.lr)"]
