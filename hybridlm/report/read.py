"""Readers of run folders and sweep folders, which are never written.

Files may be of a run that is still training, of another version, or damaged: lines that cannot be used are left out and
counted.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hybridlm.checkpoint import read_lineage
from hybridlm.config.legacy import load_saved_config
from hybridlm.config.schema import Config
from hybridlm.config.serialization import from_dict
from hybridlm.errors import ConfigError, UserError, did_you_mean, did_you_mean_path
from hybridlm.sweep.collect import read_metrics, read_results
from hybridlm.sweep.folder import POINT_FILE
from hybridlm.training.run_folder import read_sessions

EXPERT_LOAD_PREFIX = "moe/load/"
CONFIG_FILES = ("config.yaml", POINT_FILE)  # a point that never began has the second alone
RUN_FILES = ("metrics.jsonl", "config.yaml", "run.json")
Curve = tuple[list[int], list[float]]  # steps, values


@dataclass
class Run:
    """A run folder.

    `curves` are the metrics that are numbers, by name; `loads` the tokens of each expert, by step and layer; `stages`
    the first step and the name of each stage.
    """

    folder: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    loads: dict[int, dict[str, list[int]]] = field(default_factory=dict)
    stages: list[tuple[int, str]] = field(default_factory=list)
    steps: int = 0
    corrupt_lines: int = 0
    sessions: list[dict[str, Any]] = field(default_factory=list)
    lineage: dict[str, Any] | None = None  # the checkpoint that the run began from
    config_text: str = ""
    fault: str = ""  # of the config, once it was asked for

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def config(self) -> Config | None:
        """The config of the run, or None if config.yaml cannot be used; `fault` then says why."""
        file = next((self.folder / name for name in CONFIG_FILES if (self.folder / name).exists()), None)
        if file is None:
            self.fault = "there is no config.yaml"
            return None
        try:
            return from_dict(Config, load_saved_config(file))
        except UserError as error:
            self.fault = f"config.yaml cannot be used: {' '.join(str(error).split())}"
            return None

    def last(self, metric: str) -> float | None:
        """The last value of a metric, None if the run has none."""
        return self.curves[metric][1][-1] if metric in self.curves else None


@dataclass
class ProbeAccuracy:
    """Scores of an architecture on a probe; `accuracy` is the fraction of asked tokens that are right, by length."""

    label: str
    length: int
    chance: float
    accuracy: dict[int, float]


@dataclass
class PointResults:
    """A point of a sweep: its row of results.json, its run, and its probes by label."""

    row: dict[str, Any]
    run: Run
    probes: dict[str, ProbeAccuracy]


@dataclass
class Sweep:
    """A sweep folder; `results` are those of `hybridlm.sweep.collect`, `plan` is sweep.json."""

    folder: Path
    results: dict[str, Any]
    plan: dict[str, Any]
    points: list[PointResults]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def read(path: str | Path, metrics: list[str] | None = None) -> Run | Sweep:
    """Read the run or sweep in a folder; `metrics` are asked for beside the usual ones.

    Raises:
        ConfigError: no such folder, neither a run nor a sweep, a run without a step, a metric no run has.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError("report", "no such folder" if not folder.exists() else "is not a folder", got=str(path),
                          expected="a run or a sweep", hint=did_you_mean_path(folder))
    if (folder / "sweep.json").exists():
        return _read_sweep(folder, metrics or [])
    if not any((folder / name).exists() for name in RUN_FILES):
        inner = sorted({file.parent.name for name in ("sweep.json", *RUN_FILES) for file in folder.glob(f"*/{name}")})
        raise ConfigError("report", "is neither a run nor a sweep", got=str(path),
                          expected="a folder with metrics.jsonl or sweep.json",
                          hint=f"did you mean '{folder / inner[0]}'?" if inner else "")
    run = read_run(folder)
    if not run.steps:
        corrupt = f", only {run.corrupt_lines} corrupt lines" if run.corrupt_lines else ""
        raise ConfigError("report", f"this run has no steps yet (metrics.jsonl has no record{corrupt})", got=str(path))
    check_metrics(metrics or [], run.curves)
    return run


def read_run(folder: Path) -> Run:
    """Read a run folder, also one in which a file is missing."""
    run = Run(folder, sessions=[session for session in read_sessions(folder) if isinstance(session, dict)],
              lineage=read_lineage(folder))
    records, run.corrupt_lines = read_metrics(folder / "metrics.jsonl")
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        steps.setdefault(record["step"], {}).update(record)
    for step in sorted(steps):
        _add(run, step, steps[step])
    run.steps = max(steps, default=0)
    for name in CONFIG_FILES:
        with suppress(OSError):
            run.config_text = run.config_text or (folder / name).read_text(encoding="utf-8", errors="replace")
    return run


def _add(run: Run, step: int, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if _is_number(value):
            steps, values = run.curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(value))
        elif name.startswith(EXPERT_LOAD_PREFIX) and _is_number_list(value):
            run.loads.setdefault(step, {})[name.removeprefix(EXPERT_LOAD_PREFIX)] = value
    stage = record.get("stage")
    if isinstance(stage, str) and (not run.stages or run.stages[-1][1] != stage):
        run.stages.append((step, stage))


def _is_number_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(item) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_sweep(folder: Path, metrics: list[str]) -> Sweep:
    try:
        plan = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        results = read_results(folder)
        points = [PointResults(row, read_run(folder / "points" / row["point"]), _probes(results, row))
                  for row in results["points"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ConfigError("report", "holds a sweep.json that cannot be read", got=str(folder / "sweep.json"),
                          hint="the same sweep started again writes a new one") from None
    if not any(point.run.steps or point.probes for point in points):
        raise ConfigError("report", "no point of this sweep has a step yet", got=str(folder))
    check_metrics(metrics, {name for point in points for name in (*point.row["metrics"], *point.run.curves)})
    return Sweep(folder, results, plan, points)


def _probes(results: dict[str, Any], row: dict[str, Any]) -> dict[str, ProbeAccuracy]:
    """The probes that a point has finished, by label."""
    found = {}
    for label, task in results["probes"].items():
        names = {length: f"probe/{label}/accuracy" + ("" if length == task["length"] else f"@{length}")
                 for length in task["lengths"]}
        accuracy = {length: row["metrics"][name] for length, name in names.items() if name in row["metrics"]}
        if accuracy:
            found[label] = ProbeAccuracy(label, task["length"], task["chance"], accuracy)
    return found


def check_metrics(asked: list[str], known: Any) -> None:
    """Refuse a metric that no run has.

    Raises:
        ConfigError: the first such metric, with the nearest name.
    """
    for name in asked:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError("--metric", "no run has this metric", got=name,
                              expected="" if hint else f"among {', '.join(sorted(known))}",
                              hint=hint)
