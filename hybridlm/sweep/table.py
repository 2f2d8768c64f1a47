"""What a sweep is about to run, as rows and as a table: layers, parameters, costs, what matching changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hybridlm.config.serialization import to_dict
from hybridlm.inspect import scaled
from hybridlm.model.cost import count_parameters, decode_state_bytes, training_flops
from hybridlm.sweep.plan import SEED, Point, SweepPlan, short_keys
from hybridlm.training.display import duration
from hybridlm.training.stages import plan as stages_of

STATES = {"32K": 1 << 15, "1M": 1 << 20}
HEADLINES = ("validation_loss", "validation_bits_per_byte", "tokens_per_second")
MOST_COLUMNS = 4
Column = tuple[str, Callable[[list[dict[str, Any]]], str]]  # its title, and its text for the rows of one model


def cost_row(point: Point) -> dict[str, Any]:
    """What a point is and costs, as plain data. FLOPs are those of training, at its first stage's length."""
    model = point.config.model
    count = count_parameters(model)
    length = stages_of(point.config)[0].sequence_length
    return {"point": point.name, "settings": point.settings, "same_as": point.same_as, "changed": point.changed,
            "run_dir": point.config.run_dir, "layers": model.layers(), "parameters": count.total_with_mtp,
            "active_parameters": count.active_with_head, "sequence_length": length,
            "training_flops_per_token": training_flops(model, length),
            "decode_state_bytes": {str(size): decode_state_bytes(model, size) for size in STATES.values()},
            "steps": point.steps, "tokens": point.tokens}


def report(plan: SweepPlan, seconds: list[float], how: str, statuses: list[str], jobs: int) -> dict[str, Any]:
    """The plan as plain data, ready for JSON. `estimated_seconds` of the whole is for one after the other, over
    `jobs`; points that are finished are left out."""
    rows = [{**cost_row(point), "estimated_seconds": time, "status": status}
            for point, time, status in zip(plan.points, seconds, statuses, strict=True)]
    left = sum(row["estimated_seconds"] for row in rows if row["status"] != "finished")
    return {"sweep": plan.sweep.name, "dir": str(plan.folder), "match": plan.sweep.match, "vary": plan.vary,
            "language_model": plan.sweep.language_model, "probes": to_dict(plan.sweep.probes),
            "points": rows, "notes": plan.notes, "jobs": jobs, "estimated_seconds": left / jobs, "estimated_by": how}


def render(report: dict[str, Any], console: Console) -> None:
    """Prints the report; runs that differ in their seed alone share a row. Layers say what the schedule's keys do, so
    only the other varied keys have columns."""
    points = report["points"]
    keys = [key for key in points[0]["settings"] if key != SEED and not key.startswith("model.schedule.")]
    short = short_keys(keys)
    first: list[Column] = [("layers", lambda rows: layers_text(rows[0]["layers"])),
                           *((short[key], _setting(key)) for key in keys)]
    if SEED in points[0]["settings"]:
        first.append(("seeds", lambda rows: ", ".join(str(row["settings"][SEED]) for row in rows)))
    costs: list[Column] = [
        ("params", lambda rows: _count(rows[0]["parameters"])),
        ("active", lambda rows: _count(rows[0]["active_parameters"])),
        ("FLOPs/\ntoken", lambda rows: _count(rows[0]["training_flops_per_token"], " G")),
        *((f"state\n{name}", _state(size)) for name, size in STATES.items()),
        ("tokens", lambda rows: _count(rows[0]["tokens"])),
        ("time", lambda rows: _time(sum(row["estimated_seconds"] for row in rows)))]
    if any(row["status"] != "waiting" for row in points):
        costs.append(("status", lambda rows: ", ".join(dict.fromkeys(row["status"] for row in rows))))
    _print(console, points, first, costs)
    if any(row["changed"] for row in points):
        console.print("Changed by matching", style="bold")
        changes: list[Column] = [("changed", lambda rows: changes_text(rows[0]["changed"]))]
        _print(console, points, [column for column in first if column[0] != "seeds"] + changes, [])
    for note in report["notes"]:
        console.print(note, highlight=False)
    console.print(f"time: {_time(report['estimated_seconds'])} for what is left, {report['jobs']} at a time; "
                  f"{report['estimated_by']}", highlight=False)


def _print(console: Console, points: list[dict[str, Any]], left: list[Column], right: list[Column]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, _ in left:
        table.add_column(name, overflow="fold")
    for name, _ in right:
        table.add_column(name, justify="right", no_wrap=True)
    for rows in _by_model(points):
        table.add_row(*(text(rows) for _, text in [*left, *right]))
    console.print(table)


def _setting(key: str) -> Callable[[list[dict[str, Any]]], str]:
    return lambda rows: str(rows[0]["settings"][key])


def _by_model(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    def key(row: dict[str, Any]) -> str:
        return json.dumps([{k: v for k, v in row["settings"].items() if k != SEED}, row["layers"], row["changed"]])

    order = {name: index for index, name in reversed(list(enumerate(key(row) for row in rows)))}
    ordered = sorted(rows, key=lambda row: order[key(row)])
    return [list(group) for _, group in groupby(ordered, key=key)]


def layers_text(layers: list[str]) -> str:
    """How many layers of which mixer: 6 kda + 2 full."""
    return " + ".join(f"{layers.count(name)} {name}" for name in dict.fromkeys(layers))


def changes_text(changed: dict[str, list[Any]]) -> str:
    """hidden_size 64 -> 56, or nothing."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {old} -> {new}" for key, (old, new) in changed.items()) or "-"


def _time(seconds: float) -> str:
    return duration(seconds) if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def _state(size: int) -> Callable[[list[dict[str, Any]]], str]:
    return lambda rows: scaled(rows[0]["decode_state_bytes"][str(size)], 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _count(value: float, giga: str = " B") -> str:
    return scaled(value, 1000, ("", " K", " M", giga, " T", " P"))


def render_results(results: dict[str, Any], console: Console) -> None:
    """Prints mean and spread over seeds, of what matters most where nothing was asked for."""
    groups = [group for group in results["groups"] if group["metrics"]]
    names = list(dict.fromkeys(name for group in groups for name in group["metrics"]))
    scores = [name for name in names if name.startswith("probe/") and name.endswith("/accuracy")]
    shown = [name for name in HEADLINES if name in names] + scores or names[:MOST_COLUMNS]
    if not groups:
        return
    keys = [key for key in groups[0]["settings"] if not key.startswith("model.schedule.")]
    short = short_keys(keys)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("layers", *(short[key] for key in keys)):
        table.add_column(title, overflow="fold")
    for name in shown:
        title = name.removeprefix("probe/").replace("validation_", "validation\n").replace("/", "\n")
        table.add_column(title, justify="right", overflow="fold")
    for group in groups:
        values = [group["metrics"].get(name) for name in shown]
        table.add_row(layers_text(group["layers"]), *(str(group["settings"][key]) for key in keys),
                      *("-" if value is None else _mean(value) for value in values))
    console.print(table)


def _mean(value: dict[str, Any]) -> str:
    return f"{value['mean']:.4g}" + ("" if value["std"] is None else f" ± {value['std']:.2g} ({value['seeds']})")
