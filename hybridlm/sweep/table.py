"""Tables of a sweep: before it runs, layers, parameters, costs and what matching changed; afterwards the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hybridlm.config.serialization import to_dict
from hybridlm.inspect import BYTES, scaled
from hybridlm.model.cost import count_parameters, decode_state_bytes, training_flops
from hybridlm.sweep.plan import SweepPlan
from hybridlm.sweep.point import SEED_KEY, Point, shorten_keys
from hybridlm.training.display import format_duration
from hybridlm.training.stages import plan_stages

STATE_CONTEXTS = {"32K": 1 << 15, "1M": 1 << 20}  # tokens of context at which decode state is shown
HEADLINE_METRICS = ("validation_loss", "validation_bits_per_byte", "tokens_per_second")
MAX_METRIC_COLUMNS = 4  # of the table of results
Column = tuple[str, Callable[[list[dict[str, Any]]], str]]  # its title, and its text for the rows of one model


def cost_row(point: Point) -> dict[str, Any]:
    """The layers and costs of a point as plain data; FLOPs are those of training, at the length of its first stage."""
    model = point.config.model
    count = count_parameters(model)
    length = plan_stages(point.config)[0].sequence_length
    return {"point": point.name, "settings": point.settings, "same_as": point.same_as, "changed": point.changed,
            "run_dir": point.config.run_dir, "layers": model.layers(), "parameters": count.total_with_mtp,
            "active_parameters": count.active_with_head, "sequence_length": length,
            "training_flops_per_token": training_flops(model, length),
            "decode_state_bytes": {str(size): decode_state_bytes(model, size) for size in STATE_CONTEXTS.values()},
            "steps": point.steps, "tokens": point.tokens, "probes": [task.label for task in point.work.probes],
            "decode_context": point.work.decode_context}


def describe_plan(plan: SweepPlan, seconds: list[float], how: str, statuses: list[str], jobs: int) -> dict[str, Any]:
    """Describe a plan as plain data, ready for JSON.

    Args:
        plan: the sweep.
        seconds: estimated seconds of each point.
        how: how they were estimated, in words.
        statuses: status of each point.
        jobs: points at a time. The estimated seconds of the sweep are those of unfinished points, divided by this.
    """
    rows = [{**cost_row(point), "estimated_seconds": time, "status": status}
            for point, time, status in zip(plan.points, seconds, statuses, strict=True)]
    seconds_left = sum(row["estimated_seconds"] for row in rows if row["status"] != "finished")
    return {"sweep": plan.sweep.name, "dir": str(plan.folder), "match": plan.sweep.match, "vary": plan.vary,
            "language_model": plan.sweep.language_model, "probes": to_dict(plan.sweep.probes),
            "points": rows, "notes": plan.notes, "jobs": jobs, "estimated_seconds": seconds_left / jobs,
            "estimated_by": how}


def print_plan(description: dict[str, Any], console: Console) -> None:
    """Print what `describe_plan` returns; runs that differ in their seed alone share a row.

    The column of layers shows what the keys of the schedule do, so that only other varied keys have columns.
    """
    points = description["points"]
    keys = [key for key in points[0]["settings"] if key != SEED_KEY and not key.startswith("model.schedule.")]
    short = shorten_keys(keys)
    first: list[Column] = [("layers", lambda rows: format_layers(rows[0]["layers"])),
                           *((short[key], _format_setting(key)) for key in keys)]
    if SEED_KEY in points[0]["settings"]:
        first.append(("seeds", lambda rows: ", ".join(str(row["settings"][SEED_KEY]) for row in rows)))
    costs: list[Column] = [
        ("params", lambda rows: _format_count(rows[0]["parameters"])),
        ("active", lambda rows: _format_count(rows[0]["active_parameters"])),
        ("FLOPs/\ntoken", lambda rows: _format_count(rows[0]["training_flops_per_token"], " G")),
        *((f"state\n{name}", _format_state(size)) for name, size in STATE_CONTEXTS.items()),
        ("tokens", lambda rows: _format_count(rows[0]["tokens"])),
        ("time", lambda rows: _format_time(sum(row["estimated_seconds"] for row in rows)))]
    if any(row["status"] != "waiting" for row in points):
        costs.append(("status", lambda rows: ", ".join(dict.fromkeys(row["status"] for row in rows))))
    _print_table(console, points, first, costs)
    if any(row["changed"] for row in points):
        console.print("Changed by matching", style="bold")
        changes: list[Column] = [("changed", lambda rows: format_changes(rows[0]["changed"]))]
        _print_table(console, points, [column for column in first if column[0] != "seeds"] + changes, [])
    for note in description["notes"]:
        console.print(note, highlight=False)
    time = _format_time(description["estimated_seconds"])
    console.print(f"time: {time} for what is left, {description['jobs']} at a time; {description['estimated_by']}",
                  highlight=False)


def _print_table(console: Console, points: list[dict[str, Any]], left: list[Column], right: list[Column]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, _ in left:
        table.add_column(name, overflow="fold")
    for name, _ in right:
        table.add_column(name, justify="right", no_wrap=True)
    for rows in _group_by_model(points):
        table.add_row(*(text(rows) for _, text in [*left, *right]))
    console.print(table)


def _format_setting(key: str) -> Callable[[list[dict[str, Any]]], str]:
    return lambda rows: str(rows[0]["settings"][key])


def _group_by_model(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of points that differ in their seed alone, together; groups in the order of their first rows."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings = {key: value for key, value in row["settings"].items() if key != SEED_KEY}
        groups.setdefault(json.dumps([settings, row["layers"], row["changed"]]), []).append(row)
    return list(groups.values())


def format_layers(layers: list[str]) -> str:
    """Format the number of layers per mixer.

    >>> format_layers(["kda", "kda", "full", "kda"])
    '3 kda + 1 full'
    """
    return " + ".join(f"{layers.count(name)} {name}" for name in dict.fromkeys(layers))


def format_changes(changed: dict[str, list[Any]]) -> str:
    """Format the changes of `Point.changed`, or a dash.

    >>> format_changes({"model.hidden_size": [64, 56]})
    'hidden_size 64 -> 56'
    """
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {old} -> {new}" for key, (old, new) in changed.items()) or "-"


def _format_time(seconds: float) -> str:
    return format_duration(seconds) if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def _format_state(size: int) -> Callable[[list[dict[str, Any]]], str]:
    return lambda rows: scaled(rows[0]["decode_state_bytes"][str(size)], 1024, BYTES)


def _format_count(value: float, giga: str = " B") -> str:
    return scaled(value, 1000, ("", " K", " M", giga, " T", " P"))


def print_results(results: dict[str, Any], console: Console) -> None:
    """Print mean and spread over seeds: of validation loss, speed and the accuracy of probes where there are any."""
    groups = [group for group in results["groups"] if group["metrics"]]
    names = list(dict.fromkeys(name for group in groups for name in group["metrics"]))
    scores = [name for name in names if name.startswith("probe/") and name.endswith("/accuracy")]
    shown = [name for name in HEADLINE_METRICS if name in names] + scores or names[:MAX_METRIC_COLUMNS]
    if not groups:
        return
    keys = [key for key in groups[0]["settings"] if not key.startswith("model.schedule.")]
    short = shorten_keys(keys)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("layers", *(short[key] for key in keys)):
        table.add_column(title, overflow="fold")
    for name in shown:
        title = name.removeprefix("probe/").replace("validation_", "validation\n").replace("/", "\n")
        table.add_column(title, justify="right", overflow="fold")
    for group in groups:
        values = [group["metrics"].get(name) for name in shown]
        table.add_row(format_layers(group["layers"]), *(str(group["settings"][key]) for key in keys),
                      *("-" if value is None else _format_mean(value) for value in values))
    console.print(table)


def _format_mean(value: dict[str, Any]) -> str:
    return f"{value['mean']:.4g}" + ("" if value["std"] is None else f" ± {value['std']:.2g} ({value['seeds']})")
