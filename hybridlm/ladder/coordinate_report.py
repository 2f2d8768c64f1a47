"""The coordinate check of a ladder: its architectures under its parametrization, and the standard one as the control.

A check that cannot fail says nothing, so the standard parametrization is checked too and must be seen to grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hybridlm.errors import ConfigError, require
from hybridlm.files import write_json
from hybridlm.ladder.coordinates import QUANTITIES, Coordinate, CoordinateCheck, check_coordinates, steepest
from hybridlm.ladder.plan import COORDINATES_FILE, architecture_config
from hybridlm.ladder.request import LadderRequest
from hybridlm.model.config import ModelConfig
from hybridlm.model.parametrization import Kind

CONTROL: Kind = "standard"
LAYERS = 4  # of the checked models, or as many as it takes to have every mixer of the schedule
VOCABULARY = 257  # tokens of the checked models: a large table only costs time


def check_ladder(request: LadderRequest, widths: Sequence[int], say: Callable[[str], None],
                 seeds: int = 4) -> dict[str, Any]:
    """Check every architecture of a ladder, and the control; writes coordinates.json in the ladder's folder.

    Args:
        request: names architectures, optimizer and parametrization.
        widths: hidden sizes, to which hyperparameters are carried from the ladder's base rung.
        say: gets a line for every architecture.
        seeds: number of seeds of first weights and tokens.

    Returns:
        The verdicts and every coordinate as plain data.

    Raises:
        ConfigError: widths that do not ascend, a ladder without a parametrization to check.
    """
    ladder = request.ladder
    require(len(widths) > 1 and list(widths) == sorted(set(widths)), "--widths", "must ascend", got=list(widths),
            expected="such as 64,128,256")
    if ladder.parametrization == CONTROL:
        raise ConfigError("ladder.parametrization", "carries nothing that could be checked", got=CONTROL,
                          expected="mup or completep")
    require(seeds > 0, "--check-seeds", "must be positive", got=seeds)
    check = CoordinateCheck(tuple(widths), seeds=tuple(range(seeds)), base=ladder.base_size.hidden_size)
    report: dict[str, Any] = {"widths": list(widths), "parametrization": ladder.parametrization, "steps": check.steps,
                              "seeds": list(check.seeds), "architectures": {}}
    for name in ladder.architectures:
        config = architecture_config(request, name)
        model = replace(config.model.resize(num_layers=checked_layers(config.model)), vocab_size=VOCABULARY)
        found: dict[str, Any] = {"gaps": [gap for mixer in dict.fromkeys(model.layers())
                                          for gap in model.mixers[mixer].transfer_gaps()]}
        for kind in (ladder.parametrization, CONTROL):
            say(f"{name}: {kind}")
            coordinates = check_coordinates(model, config.optimizer, check, kind)
            found[kind] = _describe(coordinates)
        found["stable"] = not found[ladder.parametrization]["unstable"]
        found["control_grows"] = any(each["quantity"] in ("change", "update") and (each["slope"] or 0.0) > 0
                                     for each in found[CONTROL]["unstable"])
        report["architectures"][name] = found
    report["verdict"] = _judge(report)
    report["passes"] = report["verdict"] == "passes"
    ladder.folder.mkdir(parents=True, exist_ok=True)
    write_json(ladder.folder / COORDINATES_FILE, report)
    return report


def _judge(report: dict[str, Any]) -> str:
    """Verdict over all architectures: passes, fails, or undecided where more seeds are needed."""
    architectures = report["architectures"].values()
    if not all(each["stable"] and each["control_grows"] for each in architectures):
        return "fails"
    undecided = any(each[report["parametrization"]]["undecided"] for each in architectures)
    return "undecided" if undecided else "passes"


def checked_layers(model: ModelConfig) -> int:
    """Number of layers with which a model is checked: few, and every mixer of its schedule is among them.

    >>> from hybridlm.run_config import load_config
    >>> words = ["model=hybrid_tiny", "model.schedule.ratio=7", "model.num_layers=16"]
    >>> checked_layers(load_config("train", words).model)
    8
    """
    names = model.layers()
    return max(min(LAYERS, len(names)), 1 + max(map(names.index, names)))


def _describe(coordinates: Sequence[Coordinate]) -> dict[str, Any]:
    rows = [{"name": each.name, "quantity": each.quantity, "step": each.step, "slope": each.slope,
             "half_width": each.half_width, "diverged": each.diverged,
             "rms": {str(width): value if math.isfinite(value) else None for width, value in each.rms.items()}}
            for each in coordinates]
    shown = ("name", "quantity", "step", "slope", "half_width", "diverged")

    def rows_where(test: Callable[[Coordinate], bool]) -> list[dict[str, Any]]:
        return [{key: row[key] for key in shown} for row, each in zip(rows, coordinates, strict=True) if test(each)]

    return {"coordinates": rows, "unstable": rows_where(lambda each: not each.is_stable),
            "uncertain": rows_where(lambda each: each.is_uncertain),
            "undecided": rows_where(lambda each: each.is_undecided),
            "steepest": {quantity: found and {"name": found.name, "step": found.step, "slope": found.slope}
                         for quantity in QUANTITIES for found in [steepest(coordinates, quantity)]}}


def print_check(report: dict[str, Any], console: Console) -> None:
    """Print the steepest growth of every quantity, and what is not stable.

    Args:
        report: of `check_ladder`.
        console: where to.
    """
    kinds = (report["parametrization"], CONTROL)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    titles = [f"{quantity} grows most" for quantity in QUANTITIES]
    for title in ("architecture", "parametrization", *titles, "unstable"):
        table.add_column(title)
    for name, found in report["architectures"].items():
        for kind in kinds:
            steep = [found[kind]["steepest"][quantity] for quantity in QUANTITIES]
            table.add_row(name if kind == kinds[0] else "", kind,
                          *("-" if each is None else f"{each['slope']:+.2f} {each['name']}" for each in steep),
                          f"{len(found[kind]['unstable'])} of {len(found[kind]['coordinates'])}")
    console.print(table)
    for name, found in report["architectures"].items():
        for kind in ("unstable", "uncertain"):
            for each in found[kinds[0]][kind][:5]:
                size = (f"slope {each['slope']:+.2f} ± {each['half_width']:.2f}" if not each["diverged"] else
                        f"not finite with {each['diverged']} of {len(report['seeds'])} seeds")
                console.print(f"{name}: {each['name']} {each['quantity']} at step {each['step']}: {size}, {kind}",
                              highlight=False)
        for gap in found["gaps"]:
            console.print(f"{name}: no published rule carries {gap}", highlight=False)
        if not found["control_grows"]:
            console.print(f"{name}: the standard parametrization does not grow either, so this check says nothing",
                          highlight=False)
    said = {"passes": "activations and their changes keep their size",
            "fails": "NOT stable: carried learning rates are not to be trusted",
            "undecided": "UNDECIDED: some slopes lie beyond their bounds, in intervals that are wider than the bounds"}
    console.print(f"slopes of log2 RMS over log2 width, {report['widths']}; {said[report['verdict']]}", highlight=False)
    if any(found[kinds[0]]["uncertain"] for found in report["architectures"].values()):
        console.print(f"what is uncertain lies beyond the bounds by less than {len(report['seeds'])} seeds can tell: "
                      f"--check-seeds {4 * len(report['seeds'])} takes more", highlight=False)
