#!/usr/bin/env python
"""Compares kinds of sparse attention, and forms of the residual stream, in a 3:1 hybrid with KDA, at a tiny size.

    python scripts/experiments/sparse.py --out runs/sparse                     # goes on where it was stopped
    python scripts/experiments/sparse.py --out runs/sparse --pieces scratch    # some pieces
    python scripts/experiments/sparse.py --out runs/sparse --collect           # train nothing, write what there is

Pieces, each of which is a sweep with a folder in --out:

    scratch    attention that is full, a window, or sparse from the first step on; text and probes
    warmup     the kinds whose selection can be switched, with attention that is dense in the first fifth; text
    residual   the hybrid with full attention, with one residual stream, with mHC, and with attention residuals; text

table.md and results.csv have what all pieces scored; positions.md and positions.png have the loss by the number of
tokens before a token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from sweep_tables import label_of, run_sweeps, table_header, table_row, unfinished, write_tables

from hybridlm.evaluation.evaluate import evaluate_checkpoint
from hybridlm.files import write_json, write_text
from hybridlm.report.figures import Axis, Chart, Panel, Series
from hybridlm.report.palette import Palette
from hybridlm.report.png import write_png

PIECES = {
    "scratch": ["sweep=sparse"],
    "warmup": ["sweep=sparse", "sweep.name=sparse_warmup", "sweep.probes=[]", "recipe=dsa_scratch",
               "recipe.stages.0.steps=80", "training.steps=320",
               "recipe.stages.0.schedule={kind: constant, warmup: 20}",
               "recipe.stages.1.schedule={kind: wsd, warmup: 0, decay: 80}", "recipe.stages.1.eval_recall=false",
               "model.feed_forward.intermediate_size=208",  # of `dsa` in the piece `scratch`
               "model.schedule.pattern=choice([kda,kda,kda,dsa],[kda,kda,kda,dsa_pooled],[kda,kda,kda,msa],"
               "[kda,kda,kda,moba])"],
    "residual": ["sweep=sparse", "sweep.name=sparse_residual", "sweep.probes=[]",
                 "model.residual.form=single,mhc,attention", "model.schedule.pattern=[kda,kda,kda,full]"],
}
METRICS = ("validation_bits_per_byte",)
WINDOWS = 48  # of held-out text, for the loss by position
# Of all seeds, by label and by the first position and the one behind the last.
Losses = dict[str, dict[tuple[int, int], list[float]]]


def measure_positions(out: Path) -> dict[str, Losses]:
    """Losses by position of all finished points, by piece and label; each point is measured once."""
    file = out / "positions.json"
    measured: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found: dict[str, Losses] = {}
    for piece in PIECES:
        if not (results := out / piece / "results.json").exists():
            continue
        losses: Losses = defaultdict(lambda: defaultdict(list))
        for point in json.loads(results.read_text(encoding="utf-8"))["points"]:
            if point["status"] != "finished":
                continue
            name = f"{piece}/points/{point['point']}"
            if name not in measured:
                measured[name] = evaluate_checkpoint(out / name, parts=("perplexity",), windows=WINDOWS)["perplexity"]
                write_json(file, measured)
            label = label_of(point)
            for bucket in measured[name]["by_position"]:
                losses[label][bucket["start"], bucket["stop"]].append(bucket["loss"])
        if losses:
            found[piece] = losses
    return found


def tabulate_positions(found: dict[str, Losses]) -> str:
    """The loss by position, mean and extremes over seeds."""
    lines: list[str] = []
    for piece, losses in found.items():
        columns = list(next(iter(losses.values())))
        lines += [piece, "", *table_header("layers", *(f"{start}-{stop - 1}" for start, stop in columns))]
        lines += [table_row(label, *(f"{mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"
                                     for values in each.values())) for label, each in losses.items()]
        lines.append("")
    return "\n".join(lines)


def draw_positions(losses: Losses, file: Path) -> None:
    """Draw what each label loses against the first one, by position; the range over seeds beside the mean."""
    (_, reference), *others = losses.items()
    palette = Palette(label for label, _ in others)
    series = []
    for label, each in others:
        differences = [[own - other for own, other in zip(each[at], reference[at], strict=False)] for at in each]
        series.append(Series(label, palette[label], [(start + stop) / 2 for start, stop in each],
                             [mean(some) for some in differences], [min(some) for some in differences],
                             [max(some) for some in differences], "range", points=True))
    note = f"Against {next(iter(losses))}."
    write_png(Chart("positions", "Loss by position, less that of full attention", note,
                    Axis("tokens before", log=True), Axis("nats per byte"), [Panel("", series, (0.0, "full"))]), file)


def main() -> int:
    """Run the pieces that are asked for, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sparse"))
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="points at a time, one core per point (default 1)")
    parser.add_argument("--collect", action="store_true", help="train nothing, write what there is")
    args = parser.parse_args()
    code, ran = run_sweeps({args.out / piece: PIECES[piece] for piece in args.pieces}, args.jobs, args.collect)
    _, every = run_sweeps({args.out / piece: [] for piece in PIECES}, args.jobs, collect=True)
    write_tables(args.out, every, METRICS)
    if not any(unfinished(results) for results in ran):
        found = measure_positions(args.out)
        write_text(args.out / "positions.md", tabulate_positions(found))
        if len(found.get("scratch", ())) > 1:  # the first is what the others are compared with
            draw_positions(found["scratch"], args.out / "positions.png")
    print(f"{args.out}/table.md, {args.out}/results.csv, {args.out}/positions.md")
    return code


if __name__ == "__main__":
    sys.exit(main())
