#!/usr/bin/env python
"""Trains and scores linear mixers and hybrid ratios on probes, at a size at which two CPU cores finish.

    python scripts/experiments/hybrid_ratio.py --out runs/hybrid_ratio          # goes on where it was stopped
    python scripts/experiments/hybrid_ratio.py --out runs/hybrid_ratio --collect

Runs four sweeps, three of them files of configs/sweep/, each into a folder of --out, and writes beside them table.md,
results.csv (the scores of all) and the figures of the first one. docs/experiments/hybrid_ratio.md has what came out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sweep_tables import run_sweeps, write_tables

from hybridlm.report.build import write_report

SWEEPS = {
    "hybrid_ratio_probes": ["sweep=hybrid_ratio_probes"],
    "probe_state": ["sweep=probe_state"],
    "probe_published": ["sweep=probe_published"],
    # Four layers hold no 7:1.
    "probe_depth": ["sweep=hybrid_ratio_probes", "sweep.name=probe_depth", "model.num_layers=8",
                    "model.schedule.ratio=0,3,7"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/hybrid_ratio"))
    parser.add_argument("--jobs", type=int, default=1, help="points at a time, one core per point (default 1)")
    parser.add_argument("--collect", action="store_true", help="train nothing, write what there is")
    args = parser.parse_args()
    code, every = run_sweeps({args.out / name: words for name, words in SWEEPS.items()}, args.jobs, args.collect)
    write_tables(args.out, every)
    first = args.out / next(iter(SWEEPS))
    write_report(first, png=args.out / "figures")
    print(f"{args.out}/table.md, {args.out}/results.csv, {args.out}/figures/, {first}/report.html")
    return code


if __name__ == "__main__":
    sys.exit(main())
