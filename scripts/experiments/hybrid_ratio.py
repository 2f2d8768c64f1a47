#!/usr/bin/env python
"""Trains and scores linear mixers and hybrid ratios on probes, at a size at which two CPU cores finish.

    python scripts/experiments/hybrid_ratio.py --out runs/hybrid_ratio          # goes on where it was stopped
    python scripts/experiments/hybrid_ratio.py --out runs/hybrid_ratio --collect

Runs four sweeps, three of them files of configs/sweep/, each into a folder of --out, and writes beside them table.md,
results.csv (the scores of all) and the figures of the first one. docs/experiments/hybrid_ratio.md has what came out.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hybridlm.cli import main as hybridlm
from hybridlm.files import write_text
from hybridlm.report.build import write_report
from hybridlm.sweep.table import format_layers

SWEEPS = {
    "hybrid_ratio_probes": ["sweep=hybrid_ratio_probes"],
    "probe_state": ["sweep=probe_state"],
    "probe_published": ["sweep=probe_published"],
    # Four layers hold no 7:1.
    "probe_depth": ["sweep=hybrid_ratio_probes", "sweep.name=probe_depth", "model.num_layers=8",
                    "model.schedule.ratio=0,3,7"],
}


def table(results: dict[str, Any]) -> str:
    """Accuracy of each probe at each length, a row for points that differ in their seed alone: mean and, where there
    are several seeds, the lowest and highest."""
    columns = [(label, length, "" if length == task["length"] else f"@{length}")
               for label, task in results["probes"].items() for length in task["lengths"]]
    lines = [_row("layers", "parameters", *(f"{label}, {length} tokens" for label, length, _ in columns)),
             "|---" * (len(columns) + 2) + "|",
             _row("chance", "", *(f"{results['probes'][label]['chance']:.2f}" for label, _, _ in columns))]
    for group in results["groups"]:
        scores = [group["metrics"].get(f"probe/{label}/accuracy{at}") for label, _, at in columns]
        if any(scores):
            lines.append(_row(format_layers(group["layers"]), f"{group['parameters']:,}", *map(_score, scores)))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"{score['mean']:.2f}" + (f" ({score['min']:.2f}-{score['max']:.2f})" if score["seeds"] > 1 else "")


def scores(results: dict[str, Any]) -> Iterator[list[Any]]:
    """Rows of the experiment's results.csv: accuracies, and the seconds of each training."""
    for point in results["points"]:
        seed = point["settings"]["training.seed"]
        for name, value in point["metrics"].items():
            _, label, metric = name.split("/")
            if metric.startswith("accuracy") or metric == "seconds":
                yield [results["sweep"], format_layers(point["layers"]), seed, label, metric, f"{value:.4f}"]


def facts(every: list[dict[str, Any]]) -> str:
    """The number of trainings, their duration, and the machine and versions."""
    seconds = [value for results in every for point in results["points"] for name, value in point["metrics"].items()
               if name.endswith("/seconds")]
    return (f"{len(seconds)} trainings, {sum(seconds) / 60:.0f} minutes in all, "
            f"{statistics.median(seconds):.0f} s each (median). torch {torch.__version__}, "
            f"Python {platform.python_version()}, {platform.machine()}.\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/hybrid_ratio"))
    parser.add_argument("--jobs", type=int, default=1, help="points at a time, one core per point (default 1)")
    parser.add_argument("--collect", action="store_true", help="train nothing, write what there is")
    args = parser.parse_args()
    code, every = 0, []
    for name, words in SWEEPS.items():
        folder = args.out / name
        how = ["--collect"] if args.collect else [*words, "--jobs", str(args.jobs)]
        code = max(code, hybridlm(["sweep", f"sweep.dir={folder}", *how]))
        every.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        if not args.collect and any(point["status"] not in ("finished", "failed") for point in every[-1]["points"]):
            break  # it was stopped
    write_text(args.out / "table.md", "\n".join(f"{results['sweep']}\n\n{table(results)}" for results in every)
               + f"\n{facts(every)}")
    with (args.out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sweep", "layers", "seed", "probe", "metric", "value"])
        writer.writerows(row for results in every for row in scores(results))
    first = args.out / next(iter(SWEEPS))
    write_report(first, png=args.out / "figures")
    print(f"{args.out}/table.md, {args.out}/results.csv, {args.out}/figures/, {first}/report.html")
    return code


if __name__ == "__main__":
    sys.exit(main())
