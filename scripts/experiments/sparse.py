#!/usr/bin/env python
"""Compares kinds of sparse attention, and forms of the residual stream, in a 3:1 hybrid with KDA, at a tiny size.

    python scripts/experiments/sparse.py --out runs/sparse                     # goes on where it was stopped
    python scripts/experiments/sparse.py --out runs/sparse --pieces scratch    # some pieces
    python scripts/experiments/sparse.py --out runs/sparse --collect           # train nothing, write what there is

Pieces, each of which is a sweep with a folder in --out:

    scratch    attention that is full, a window, or sparse from the first step on; text and probes
    warmup     the kinds whose selection can be switched, with attention that is dense in the first fifth; text
    residual   the hybrid with full attention, with one residual stream, with mHC, and with attention residuals

table.md and results.csv have what all pieces scored; positions.md has the loss by the number of tokens before a token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from sweep_tables import run_sweeps, table_row, unfinished, write_tables

from hybridlm.evaluation.evaluate import evaluate_checkpoint
from hybridlm.files import write_json, write_text
from hybridlm.sweep.table import format_layers

PIECES = {
    "scratch": ["sweep=sparse"],
    "warmup": ["sweep=sparse", "sweep.name=sparse_warmup", "sweep.probes=[]", "recipe=dsa_scratch",
               "recipe.stages.0.steps=80", "training.steps=320",
               "recipe.stages.0.schedule={kind: constant, warmup: 20}",
               "recipe.stages.1.schedule={kind: wsd, warmup: 0, decay: 80}", "recipe.stages.1.eval_recall=false",
               "model.feed_forward.intermediate_size=208",  # of `dsa` in the piece `scratch`
               "model.schedule.pattern=choice([kda,kda,kda,dsa],[kda,kda,kda,dsa_pooled],[kda,kda,kda,msa],"
               "[kda,kda,kda,moba])"],
    "residual": ["sweep=sparse", "sweep.name=sparse_residual", "model.residual.form=single,mhc,attention",
                 "model.schedule.pattern=[kda,kda,kda,full]"],
}
METRICS = ("validation_bits_per_byte",)
WINDOWS = 48  # of held-out text, for the loss by position


def positions(out: Path) -> None:
    """Write the loss by position of every finished point, mean and extremes over seeds; measured once per point."""
    file = out / "positions.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    lines: list[str] = []
    for piece in PIECES:
        if not (results := out / piece / "results.json").exists():
            continue
        losses: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for point in json.loads(results.read_text(encoding="utf-8"))["points"]:
            if point["status"] != "finished":
                continue
            name = f"{piece}/points/{point['point']}"
            if name not in found:
                found[name] = evaluate_checkpoint(out / name, parts=("perplexity",), windows=WINDOWS)["perplexity"]
                write_json(file, found)
            label = f"{format_layers(point['layers'])} {point['settings'].get('model.residual.form', '')}".strip()
            for bucket in found[name]["by_position"]:
                losses[label][f"{bucket['start']}-{bucket['stop'] - 1}"].append(bucket["loss"])
        if losses:
            columns = list(next(iter(losses.values())))
            lines += [piece, "", table_row("layers", *columns), "|---" * (len(columns) + 1) + "|"]
            lines += [table_row(label, *(f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"
                                         for values in each.values())) for label, each in losses.items()]
            lines.append("")
    write_text(out / "positions.md", "\n".join(lines))


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
        positions(args.out)
    print(f"{args.out}/table.md, {args.out}/results.csv, {args.out}/positions.md")
    return code


if __name__ == "__main__":
    sys.exit(main())
