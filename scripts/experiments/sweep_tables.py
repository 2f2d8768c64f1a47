"""Sweeps of probes run one after the other, and the tables of what they scored; for the scripts beside it."""

from __future__ import annotations

import csv
import json
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hybridlm.cli import main as hybridlm
from hybridlm.files import write_text
from hybridlm.sweep.table import format_layers


def run_sweeps(sweeps: Mapping[Path, Sequence[str]], jobs: int, collect: bool) -> tuple[int, list[dict[str, Any]]]:
    """Run sweeps, or go on with them, up to the first one that is stopped.

    Args:
        sweeps: the settings of each by its folder.
        jobs: points at a time.
        collect: train nothing, and read what there is.

    Returns:
        The exit code, and the results of each sweep that has any.
    """
    code, every = 0, []
    for folder, words in sweeps.items():
        if collect and not (folder / "sweep.json").exists():
            continue
        how = ["--collect"] if collect else [*words, "--jobs", str(jobs)]
        code = max(code, hybridlm(["sweep", f"sweep.dir={folder}", *how]))
        if not (folder / "results.json").exists():
            break
        every.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        if not collect and unfinished(every[-1]):
            break
    return code, every


def unfinished(results: Mapping[str, Any]) -> list[str]:
    """Points of a sweep that was stopped: neither finished nor failed. The exit code of a stopped sweep is 0.

    Args:
        results: the content of results.json.
    """
    return [point["point"] for point in results["points"] if point["status"] not in ("finished", "failed")]


def write_tables(out: Path, every: Sequence[dict[str, Any]], metrics: Sequence[str] = ()) -> None:
    """Write table.md and results.csv of all sweeps; `metrics` of training on text stand beside the probes."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", "\n".join(f"{results['sweep']}\n\n{table(results, metrics)}" for results in every)
               + f"\n{facts(every)}")
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sweep", "layers", "seed", "probe", "metric", "value"])
        writer.writerows(row for results in every for row in scores(results, metrics))


def table(results: dict[str, Any], metrics: Sequence[str] = ()) -> str:
    """Accuracy of each probe at each length and `metrics` behind them, a row for points that differ in the seed alone.

    A cell is the mean and, where there are several seeds, the lowest and the highest.
    """
    columns = [(label, length, "" if length == task["length"] else f"@{length}")
               for label, task in results["probes"].items() for length in task["lengths"]]
    lines = [table_row("layers", "parameters", *(f"{label}, {length} tokens" for label, length, _ in columns),
                       *(name.replace("_", " ") for name in metrics)),
             "|---" * (len(columns) + len(metrics) + 2) + "|",
             table_row("chance", "", *(f"{results['probes'][label]['chance']:.2f}" for label, _, _ in columns),
                       *("" for _ in metrics))]
    for group in results["groups"]:
        names = [*(f"probe/{label}/accuracy{at}" for label, _, at in columns), *metrics]
        found = [group["metrics"].get(name) for name in names]
        if any(found):
            lines.append(table_row(label_of(group), f"{group['parameters']:,}", *map(_score, found)))
    return "\n".join(lines) + "\n"


def label_of(point: Mapping[str, Any]) -> str:
    """The layers of a point or group, and its residual form where the sweep varies it."""
    return f"{format_layers(point['layers'])} {point['settings'].get('model.residual.form', '')}".strip()


def table_row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_header(*cells: str) -> list[str]:
    """The header of a Markdown table, two lines."""
    return [table_row(*cells), "|---" * len(cells) + "|"]


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"{score['mean']:.2f}" + (f" ({score['min']:.2f}-{score['max']:.2f})" if score["seeds"] > 1 else "")


def scores(results: dict[str, Any], metrics: Sequence[str] = ()) -> Iterator[list[Any]]:
    """Rows of results.csv: accuracies and the seconds of each training, and `metrics` of training on text."""
    for point in results["points"]:
        start = [results["sweep"], label_of(point), point["settings"]["training.seed"]]
        for name, value in point["metrics"].items():
            if name.startswith("probe/"):
                _, label, metric = name.split("/")
                if metric.startswith("accuracy") or metric == "seconds":
                    yield [*start, label, metric, f"{value:.4f}"]
            elif name in metrics:
                yield [*start, "text", name, f"{value:.4f}"]


def facts(every: Sequence[dict[str, Any]]) -> str:
    """The number of trainings on probes, their duration, and the machine and versions."""
    seconds = [value for results in every for point in results["points"] for name, value in point["metrics"].items()
               if name.startswith("probe/") and name.endswith("/seconds")]
    median = f"{statistics.median(seconds):.0f} s each (median). " if seconds else ""
    return (f"{len(seconds)} trainings, {sum(seconds) / 60:.0f} minutes in all, {median}torch {torch.__version__}, "
            f"Python {platform.python_version()}, {platform.machine()}.\n")
