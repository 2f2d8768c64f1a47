"""The content of a page: facts, figures, tables, and the commands and versions behind the numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybridlm.checkpoint import describe_lineage
from hybridlm.errors import ConfigError
from hybridlm.inspect import COUNTS, scaled
from hybridlm.model.cost import count_parameters, decode_state_bytes
from hybridlm.report.comparison import (
    Comparison,
    comparison_figures,
    config_differences,
    final_numbers,
    tables,
)
from hybridlm.report.figures import Figure, Table, number
from hybridlm.report.ladder_figures import ladder_facts, ladder_figures, ladder_notes, ladder_tables
from hybridlm.report.palette import Palette, Style
from hybridlm.report.read import Run, Sweep
from hybridlm.report.run_figures import run_figures
from hybridlm.report.sweep_axes import Axes
from hybridlm.report.sweep_figures import sweep_figures
from hybridlm.sweep.point import shorten_keys
from hybridlm.sweep.table import STATE_CONTEXTS, format_changes, format_layers
from hybridlm.training.display import format_duration

RESULT_METRICS = ("validation_loss", "validation_bits_per_byte", "tokens_per_second", "peak_memory_bytes")


@dataclass(frozen=True)
class ReportDocument:
    """The content of a page without its form; `layers` are a model's mixers by depth, `texts` files as they are."""

    kind: str
    name: str
    facts: list[tuple[str, str]]
    layers: list[tuple[str, Style]]
    figures: list[Figure]
    tables: list[tuple[str, Table]]
    texts: list[tuple[str, str]]
    notes: list[str]


def document(read: Run | Sweep | Comparison, metrics: Sequence[str] = ()) -> ReportDocument:
    """Make the content of a page from what was read; `metrics` are drawn beside the usual figures."""
    if isinstance(read, Comparison):
        return _of_comparison(read, metrics)
    return _of_run(read, metrics) if isinstance(read, Run) else _of_sweep(read, metrics)


def _of_run(run: Run, metrics: Sequence[str]) -> ReportDocument:
    figures, missing = run_figures(run, metrics)
    layers = run.config.model.layers() if run.config is not None else []
    palette = Palette(layers)
    return ReportDocument("run", run.name, _run_facts(run), [(name, palette[name]) for name in layers], figures,
                          _provenance([("", run)]), [("config.yaml", run.config_text)] if run.config_text else [],
                          [*_corrupt(run), *([run.fault] if run.fault else []), *_missing(missing)])


def _of_comparison(comparison: Comparison, metrics: Sequence[str]) -> ReportDocument:
    figures, missing = comparison_figures(comparison, metrics)
    compared = tables(final_numbers(comparison), config_differences(comparison))
    texts = [(f"config.yaml of {name}", run.config_text) for name, run in comparison.pairs() if run.config_text]
    notes = [note for name, run in comparison.pairs()
             for note in (*_corrupt(run), *([f"{name}: {run.fault}"] if run.fault else []))]
    facts = [(name, f"{run.steps:,} steps") for name, run in comparison.pairs()]
    return ReportDocument("comparison", comparison.name, facts, [], figures,
                          [*compared, *_provenance(comparison.pairs(), column="run")], texts,
                          [*notes, *_missing(missing)])


def _missing(names: list[str]) -> list[str]:
    return [f"not drawn because there is no data: {', '.join(names)}"] if names else []


def _corrupt(run: Run) -> list[str]:
    return [f"{run.corrupt_lines} corrupt lines of {run.name}/metrics.jsonl were skipped"] if run.corrupt_lines else []


def _run_facts(run: Run) -> list[tuple[str, str]]:
    last = run.sessions[-1] if run.sessions else {}
    facts: list[tuple[str, str]] = []
    if run.config is not None:
        model = run.config.model
        facts += [("model", model.name or "unnamed"), ("layers", format_layers(model.layers()))]
        try:
            counts = count_parameters(model)
            facts += [("parameters", f"{_count(counts.total_with_mtp)}, {_count(counts.active_with_head)} active"),
                      ("decode state", ", ".join(f"{number(decode_state_bytes(model, size), 'bytes')} at {name}"
                                                 for name, size in STATE_CONTEXTS.items()))]
        except ConfigError as error:
            facts.append(("model", str(error)))
    facts.append(("steps", f"{run.steps:,}" + (f", {_count(tokens)} tokens" if (tokens := run.last("tokens")) else "")))
    if (seconds := run.last("seconds")) is not None:
        facts.append(("training time", format_duration(seconds)))
    for metric, title in (("validation_loss", "validation loss"), ("validation_perplexity", "perplexity"),
                          ("validation_bits_per_byte", "bits per byte"), ("skipped_steps", "skipped steps")):
        value = run.last(metric)
        if value is not None and not (metric == "skipped_steps" and value == 0):
            facts.append((title, number(value)))
    if "tokens_per_second" in run.curves:
        facts.append(("tokens/s", number(statistics.median(run.curves["tokens_per_second"][1]))))
    if "peak_memory_bytes" in run.curves:
        facts.append(("peak memory", number(max(run.curves["peak_memory_bytes"][1]), "bytes")))
    where = [str(last[key]) for key in ("device", "precision") if key in last]
    return facts + ([("on", ", ".join(where))] if where else [])


def _count(value: float) -> str:
    return scaled(value, 1000, COUNTS)


def _provenance(runs: list[tuple[str, Run]], column: str = "point") -> list[tuple[str, Table]]:
    """Tables of the commands, and of machine and versions where these differ between sessions."""
    named = len(runs) > 1
    commands: list[list[str]] = []
    versions: dict[str, list[str]] = {}
    for name, run in runs:
        for session in run.sessions:
            said = [str(session.get(key, "")) for key in ("started", "command")]
            commands.append([name, *said] if named else said)
            facts: dict[str, Any] = {key: session[key] for key in ("device", "precision", "threads") if key in session}
            facts |= session["versions"] if isinstance(session.get("versions"), dict) else {}
            versions.setdefault(json.dumps(facts), []).append(name)
    tables = []
    if origins := [[*([name] if named else []), line] for name, run in runs for line in describe_lineage(run.lineage)]:
        tables.append(("Began from", Table([*(["point"] if named else []), "checkpoint and changes"], origins)))
    if commands:
        tables.append(("Commands", Table([*([column] if named else []), "started (UTC)", "command"], commands)))
    if versions:
        columns = [json.loads(key) for key in versions]
        names = list(dict.fromkeys(name for column in columns for name in column))
        rows = [[name, *(str(column.get(name, "-")) for column in columns)] for name in names]
        titles = [""] if len(columns) == 1 else [f"{len(members)} sessions" if len(members) > 1 else "1 session"
                                               for members in versions.values()]
        tables.append(("Machine and versions", Table(["", *titles], rows)))
    return tables


def _of_sweep(sweep: Sweep, metrics: Sequence[str]) -> ReportDocument:
    first = sweep.points[0]
    sections = [("Points", _points(sweep)), *_provenance([(point.row["point"], point.run) for point in sweep.points])]
    command = sweep.plan.get("command")
    if isinstance(command, str):
        sections.insert(0, ("Command", Table(["command"], [[command]])))
    texts = [(f"config.yaml of {first.row['point']}", first.run.config_text)] if first.run.config_text else []
    notes = [str(note) for note in sweep.plan.get("notes", [])]
    notes += [note for point in sweep.points for note in _corrupt(point.run)]
    if "ladder" in sweep.plan:
        folder = sweep.folder
        asked = [figure for figure in (sweep_figures(sweep, Axes(sweep), metrics)[0] if metrics else [])
                 if figure.id.startswith("metric-")]
        return ReportDocument("ladder", sweep.name, ladder_facts(folder), [], [*ladder_figures(folder), *asked],
                              [*ladder_tables(folder), *sections], texts, [*ladder_notes(folder), *notes])
    figures, missing = sweep_figures(sweep, Axes(sweep), metrics)
    return ReportDocument("sweep", sweep.name, _sweep_facts(sweep), [], figures, sections, texts,
                          [*notes, *_missing(missing)])


def _sweep_facts(sweep: Sweep) -> list[tuple[str, str]]:
    results = sweep.results
    statuses = [point.row["status"] for point in sweep.points]
    short = shorten_keys(list(results["vary"]))
    facts = [(short[key], ", ".join(str(value) for value in values)) for key, values in results["vary"].items()]
    facts.append(("equal budgets", str(results["match"])))
    counted = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    facts += [("points", counted), ("tokens per point", _count(sweep.points[0].row["tokens"]))]
    return facts


def _points(sweep: Sweep) -> Table:
    """The points of a sweep: their layers, costs, and the metrics they reached."""
    labels = list(dict.fromkeys(label for point in sweep.points for label in point.probes))
    known = {name for point in sweep.points for name in point.row["metrics"]}
    metrics = [name for name in RESULT_METRICS if name in known]
    changed = any(point.row["changed"] for point in sweep.points)
    rows = []
    for point in sweep.points:
        row = point.row
        probes = point.probes
        rows.append([row["point"], format_layers(row["layers"]), *([format_changes(row["changed"])] if changed else []),
                     _count(row["parameters"]), _count(row["active_parameters"]),
                     *(number(row["decode_state_bytes"][str(size)], "bytes") for size in STATE_CONTEXTS.values()),
                     *(_metric(row["metrics"], name) for name in metrics),
                     *(number(probes[label].accuracy.get(probes[label].length)) if label in probes else "-"
                       for label in labels),
                     row["status"] + (f": {row['reason']}" if "reason" in row else "")])
    header = ["point", "layers", *(["changed to match"] if changed else []), "parameters", "active",
              *(f"state {name}" for name in STATE_CONTEXTS), *(name.replace("_", " ") for name in metrics), *labels,
              "status"]
    return Table(header, rows)


def _metric(metrics: dict[str, Any], name: str) -> str:
    return number(metrics.get(name), "bytes" if name.endswith("_bytes") else "number")
