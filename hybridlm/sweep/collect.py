"""Collects the results of a sweep: one number per run and metric, then mean and spread over seeds.

`results.csv` has one row per point and metric; `results.json` has the same points with their costs, and the groups of
points that differ in their seed alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridlm.config.serialization import to_dict
from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.files import write_json, write_text
from hybridlm.sweep.folder import is_busy, read_outcome, read_plan
from hybridlm.sweep.point import SEED_KEY
from hybridlm.sweep.probe_tasks import ProbeTask, read_decode_metrics, read_probe_result, read_tasks
from hybridlm.sweep.slurm_jobs import find_pending_jobs

LAST_STEPS_FRACTION = 0.1  # fraction of the steps, the last ones, over which noisy training metrics are averaged
COST_COLUMNS = ("parameters", "active_parameters", "training_flops_per_token")
NOT_METRICS = ("step", "samples", "lr", "skipped")
SUMMARIES_OVER_RUN: dict[str, Callable[[list[float]], float]] = {
    "tokens_per_second": statistics.median, "flops_per_second": statistics.median, "mfu": statistics.median,
    "peak_memory_bytes": max}
LAST_VALUE_METRICS = ("tokens", "seconds", "skipped_steps")


def collect(folder: Path, metrics: list[str] | None = None) -> dict[str, Any]:
    """Read what the finished points of a sweep wrote, and write results.csv and results.json.

    Args:
        folder: the sweep's folder.
        metrics: the metrics to keep; None: all.

    Returns:
        The content of results.json.

    Raises:
        ConfigError: there is no sweep, or no run has such a metric; earlier results stay as they are.
    """
    results = read_results(folder, metrics)
    write_text(folder / "results.csv", _format_csv(results["points"], results["probes"]))
    write_json(folder / "results.json", results)
    return results


def read_results(folder: Path, metrics: list[str] | None = None) -> dict[str, Any]:
    """Collect the results as `collect` does, without writing them."""
    plan = read_plan(folder)
    if plan is None:
        raise ConfigError("sweep.dir", "holds no sweep", got=str(folder), expected="the folder of a started one",
                          hint="run the sweep first, without --collect")
    probes = read_tasks(plan.get("probes", []))
    points = [_read_point(folder, row, probes) for row in plan["points"]]
    jobs = find_pending_jobs(folder)
    for point in points:
        if point["status"] == "waiting" and point["point"] in jobs:
            point |= {"status": jobs[point["point"]].state, "job": jobs[point["point"]].id}
        elif point["status"] == "waiting" and is_busy(Path(point["run_dir"])):
            point["status"] = "running"
    known = sorted({name for point in points for name in point["metrics"]})
    for name in (metrics or []) if known else []:
        if name not in known:
            raise ConfigError("sweep.metrics", "no run has this metric", got=name, expected=f"among {', '.join(known)}",
                              hint=did_you_mean(name, known))
    for point in points:
        point["metrics"] = {name: point["metrics"][name] for name in metrics or known if name in point["metrics"]}
    return {"sweep": plan["sweep"], "match": plan["match"], "vary": plan["vary"],
            "probes": {task.label: {**to_dict(task), "chance": task.probe().chance} for task in probes},
            "points": points, "groups": group_by_seed(points),
            "corrupt_lines": sum(point["corrupt_lines"] for point in points)}


def _read_point(folder: Path, row: dict[str, Any], probes: list[ProbeTask]) -> dict[str, Any]:
    """Read one point: its costs, its outcome, its metrics if it is finished, and those of every finished probe."""
    run_dir = folder / "points" / row["point"]
    probes = [task for task in probes if task.label in row.get("probes", [task.label])]  # a ladder's largest rung alone
    context = row.get("decode_context")
    ended = read_outcome(run_dir, row["steps"], probes, context)
    records, corrupt_lines = read_metrics(run_dir / "metrics.jsonl")
    costs = {key: row[key] for key in ("point", "settings", "same_as", "changed", "layers", *COST_COLUMNS,
                                      "decode_state_bytes", "sequence_length", "steps", "tokens")}
    metrics = summarize(records) | read_decode_metrics(run_dir, context) if ended["status"] == "finished" else {}
    for task in probes:
        metrics |= name_probe_metrics(task, read_probe_result(run_dir, task))
    point = {**costs, "run_dir": str(run_dir), "status": ended["status"]}
    if ended["status"] == "failed" and "reason" in ended:
        point |= {"reason": ended["reason"], "diverged": ended.get("diverged", False)}
    return {**point, "corrupt_lines": corrupt_lines, "metrics": metrics}


def name_probe_metrics(task: ProbeTask, result: dict[str, Any] | None) -> dict[str, float]:
    """Name the scores of one probe: those at the length of training by the probe, those at others with `@LENGTH`."""
    if result is None:
        return {}
    found = {"loss": result["loss"], "seconds": result["seconds"]}
    for length, score in result["accuracy"].items():
        at = "" if int(length) == task.length else f"@{length}"
        found |= {f"accuracy{at}": score["token"], f"exact{at}": score["exact"]}
    return {f"probe/{task.label}/{name}": value for name, value in found.items() if value is not None}


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the records of a metrics.jsonl, and count its corrupt lines, which are skipped."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return [], 0
    records = []
    corrupt_lines = 0
    for line in lines:
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
            records.append(record)
        except (ValueError, KeyError, TypeError):
            corrupt_lines += 1
    return records, corrupt_lines


def summarize(records: list[dict[str, Any]]) -> dict[str, float]:
    """One number per metric of a run.

    Validation metrics and totals have their last value, speeds their median, memory its maximum. Everything else is
    noisy from step to step and has its mean over the last tenth of the steps.

    >>> summarize([{"step": 1, "loss": 4.0, "peak_memory_bytes": 9}, {"step": 2, "loss": 3.0, "peak_memory_bytes": 7}])
    {'loss': 3.0, 'peak_memory_bytes': 9.0}
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and name not in NOT_METRICS:
                series.setdefault(name, []).append((record["step"], float(value)))
    last = max((record["step"] for record in records), default=0)
    result = {}
    for name, pairs in series.items():
        values = [value for _, value in pairs]
        if name in SUMMARIES_OVER_RUN:
            result[name] = SUMMARIES_OVER_RUN[name](values)
        elif name in LAST_VALUE_METRICS or name.startswith("validation"):
            result[name] = values[-1]
        else:
            late = [value for step, value in pairs if step > last * (1 - LAST_STEPS_FRACTION)]
            result[name] = statistics.fmean(late or values[-1:])
    return result


def group_by_seed(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group the points that differ in their seed alone, with mean and spread of each metric."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        settings = {key: value for key, value in point["settings"].items() if key != SEED_KEY}
        groups.setdefault(json.dumps(settings), []).append(point)
    return [_summarize_group(json.loads(settings), members) for settings, members in groups.items()]


def _summarize_group(settings: dict[str, Any], members: list[dict[str, Any]]) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for point in members:
        for name, value in point["metrics"].items():
            values.setdefault(name, []).append(value)
    first = members[0]
    return {"settings": settings, "points": [point["point"] for point in members], "layers": first["layers"],
            **{cost: first[cost] for cost in COST_COLUMNS}, "decode_state_bytes": first["decode_state_bytes"],
            "metrics": {name: spread_over_seeds(numbers) for name, numbers in values.items()}}


def spread_over_seeds(values: list[float]) -> dict[str, Any]:
    """Compute mean, standard deviation of the sample (None for one seed), minimum, maximum and number of seeds.

    >>> spread_over_seeds([2.0, 4.0])
    {'mean': 3.0, 'std': 1.4142135623730951, 'min': 2.0, 'max': 4.0, 'seeds': 2}
    """
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
            "min": min(values), "max": max(values), "seeds": len(values)}


def _format_csv(points: list[dict[str, Any]], probes: dict[str, dict[str, Any]]) -> str:
    """results.csv: one row per point and metric.

    Settings, costs and, for the metrics of a probe, the parameters of the probe have columns of their own.
    """
    keys = list(dict.fromkeys(key for point in points for key in point["settings"]))
    contexts = list(points[0]["decode_state_bytes"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    probe_column = ["probe"] if probes else []
    writer.writerow(["point", *keys, *COST_COLUMNS, *(f"decode_state_bytes_{size}" for size in contexts), "metric",
                     "value", *probe_column])
    described = {f"probe/{label}": json.dumps({key: value for key, value in task.items() if key != "label"})
                 for label, task in probes.items()}
    for point in points:
        settings = [point["settings"].get(key, "") for key in keys]
        costs = [point[cost] for cost in COST_COLUMNS]
        states = [point["decode_state_bytes"][size] for size in contexts]
        for name, value in point["metrics"].items():
            probe = [described.get(name.rpartition("/")[0], "")] if probes else []
            writer.writerow([point["point"], *settings, *costs, *states, name, value, *probe])
    return text.getvalue()
