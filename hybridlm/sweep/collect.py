"""Results of a sweep: one number a run and metric, then mean and spread over seeds.

`results.csv` has a row a point and metric; `results.json` has the same points with their costs, and the groups of
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
from hybridlm.sweep.cluster import in_flight
from hybridlm.sweep.folder import is_busy, read_outcome, read_plan
from hybridlm.sweep.plan import SEED
from hybridlm.sweep.probes import ProbeTask, read_result, read_tasks

TAIL = 0.1  # share of the steps, the last ones, over which a noisy training metric is averaged
COSTS = ("parameters", "active_parameters", "training_flops_per_token")
_NO_METRIC = ("step", "samples", "lr", "skipped")
_OVER_RUN: dict[str, Callable[[list[float]], float]] = {
    "tokens_per_second": statistics.median, "flops_per_second": statistics.median, "mfu": statistics.median,
    "peak_memory_bytes": max}
_AT_END = ("tokens", "seconds", "skipped_steps")


def collect(folder: Path, metrics: list[str] | None = None) -> dict[str, Any]:
    """Reads what the finished points of a sweep wrote, writes results.csv and results.json, returns the latter.

    Raises:
        ConfigError: no sweep there, or a metric no run has; earlier results stay as they are.
    """
    results = read_results(folder, metrics)
    write_text(folder / "results.csv", _table(results["points"], results["probes"]))
    write_json(folder / "results.json", results)
    return results


def read_results(folder: Path, metrics: list[str] | None = None) -> dict[str, Any]:
    """What `collect` writes, without writing it."""
    plan = read_plan(folder)
    if plan is None:
        raise ConfigError("sweep.dir", "holds no sweep", got=str(folder), expected="a folder with sweep.json",
                          hint="run the sweep first, without --collect")
    probes = read_tasks(plan.get("probes", []))
    points = [_point(folder, row, probes) for row in plan["points"]]
    jobs = in_flight(folder)
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
            "points": points, "groups": _groups(points),
            "corrupt_lines": sum(point["corrupt_lines"] for point in points)}


def _point(folder: Path, row: dict[str, Any], probes: list[ProbeTask]) -> dict[str, Any]:
    """A point with its costs, how it ended, its metrics where it is finished, and those of every finished probe."""
    run_dir = folder / "points" / row["point"]
    ended = read_outcome(run_dir, row["steps"], probes)
    records, corrupt = read_metrics(run_dir / "metrics.jsonl")
    kept = {key: row[key] for key in ("point", "settings", "same_as", "changed", "layers", *COSTS,
                                      "decode_state_bytes", "sequence_length", "steps", "tokens")}
    metrics = summarize(records) if ended["status"] == "finished" else {}
    for task in probes:
        metrics |= probe_metrics(task, read_result(run_dir, task))
    return {**kept, "run_dir": str(run_dir), "status": ended["status"],
            **({"reason": ended["reason"]} if ended["status"] == "failed" and "reason" in ended else {}),
            "corrupt_lines": corrupt, "metrics": metrics}


def probe_metrics(task: ProbeTask, result: dict[str, Any] | None) -> dict[str, float]:
    """Of one probe, by name: the scores at the length of training, `@LENGTH` those at others."""
    if result is None:
        return {}
    found = {"loss": result["loss"], "seconds": result["seconds"]}
    for length, score in result["accuracy"].items():
        at = "" if int(length) == task.length else f"@{length}"
        found |= {f"accuracy{at}": score["token"], f"exact{at}": score["exact"]}
    return {f"probe/{task.label}/{name}": value for name, value in found.items() if value is not None}


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a metrics.jsonl, and how many lines are corrupt and were skipped."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return [], 0
    records, corrupt = [], 0
    for line in lines:
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
            records.append(record)
        except (ValueError, KeyError, TypeError):
            corrupt += 1
    return records, corrupt


def summarize(records: list[dict[str, Any]]) -> dict[str, float]:
    """One number a metric. Validation and totals: the last. Speeds: the median. Memory: the most. All else is noisy
    from step to step: the mean of the last tenth of the steps."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and name not in _NO_METRIC:
                series.setdefault(name, []).append((record["step"], float(value)))
    last = max((record["step"] for record in records), default=0)
    result = {}
    for name, pairs in series.items():
        values = [value for _, value in pairs]
        if name in _OVER_RUN:
            result[name] = _OVER_RUN[name](values)
        elif name in _AT_END or name.startswith("validation"):
            result[name] = values[-1]
        else:
            result[name] = statistics.fmean([v for step, v in pairs if step > last * (1 - TAIL)] or values[-1:])
    return result


def _groups(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that differ in their seed alone, with mean and spread of each metric."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        settings = {key: value for key, value in point["settings"].items() if key != SEED}
        groups.setdefault(json.dumps(settings), []).append(point)
    return [{"settings": json.loads(key), "points": [point["point"] for point in members],
             "layers": members[0]["layers"], **{cost: members[0][cost] for cost in COSTS},
             "decode_state_bytes": members[0]["decode_state_bytes"],
             "metrics": {name: spread([point["metrics"][name] for point in members if name in point["metrics"]])
                         for name in dict.fromkeys(name for point in members for name in point["metrics"])}}
            for key, members in groups.items()]


def spread(values: list[float]) -> dict[str, Any]:
    """Mean over seeds, standard deviation of the sample (null for one seed), the ends and how many."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
            "min": min(values), "max": max(values), "seeds": len(values)}


def _table(points: list[dict[str, Any]], probes: dict[str, dict[str, Any]]) -> str:
    """A row a point and metric; settings, costs and, of a probe's metric, what the probe was stand in columns of their
    own."""
    keys = list(dict.fromkeys(key for point in points for key in point["settings"]))
    contexts = list(points[0]["decode_state_bytes"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", *keys, *COSTS, *(f"decode_state_bytes_{size}" for size in contexts), "metric", "value",
                     *(["probe"] if probes else [])])
    described = {f"probe/{label}": json.dumps({key: value for key, value in task.items() if key != "label"})
                 for label, task in probes.items()}
    for point in points:
        fixed = [point["point"], *(point["settings"].get(key, "") for key in keys), *(point[cost] for cost in COSTS),
                 *(point["decode_state_bytes"][size] for size in contexts)]
        writer.writerows([*fixed, name, value, *([described.get(name.rpartition("/")[0], "")] if probes else [])]
                         for name, value in point["metrics"].items())
    return text.getvalue()
