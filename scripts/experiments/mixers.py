#!/usr/bin/env python
"""Compares every recurrent mixer, alone and as a 3:1 hybrid, by probes and by the loss on text, at a tiny size.

    python scripts/experiments/mixers.py --out runs/mixers                     # goes on where it was stopped
    python scripts/experiments/mixers.py --out runs/mixers --pieces delta      # some pieces
    python scripts/experiments/mixers.py --out runs/mixers --collect           # train nothing, write what there is

A piece is a sweep of configs/sweep/mixers.yaml over presets of one family; each has its folder in --out. table.md and
results.csv beside them have what all pieces scored so far. Parameters of all points agree within 1 %, so `mamba3_mimo`
and `falcon_h1`, whose projections are too wide for that, and `aft_full` and `aft_local`, whose biases grow with the
square of the longest sequence, are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sweep_tables import run_sweeps, write_tables

PIECES = {  # `full` comes first in each: its parameters are those of all points
    "delta": ["full", "kda", "gdn", "deltanet", "gdn2", "delta_product", "gated_delta_product", "comba",
              "preconditioned_gdn", "preconditioned_kda", "longhorn", "longhorn_exact", "log_linear_gdn", "mesa_net",
              "rwkv4", "rwkv5", "rwkv6", "rwkv7"],
    "state_space": ["full", "mamba", "mamba2", "mamba3", "ssd", "s4d", "h3", "griffin", "hgrn", "hgrn2", "hgrn_complex",
                    "gate_loop", "simple_gate_loop", "min_gru", "min_lstm", "log_linear_mamba2", "ttt_linear",
                    "ttt_mlp", "titans_linear", "titans_mlp"],
    "gated": ["full", "lightning", "retnet", "gla", "transnormer", "gsa", "abc", "lightnet", "rodimus", "mom", "mlstm",
              "mlstm_block", "slstm", "linear_transformer", "performer", "rfa", "rfa_gate", "cosformer", "hedgehog",
              "based", "rebased", "dpfp", "t2r", "aft_simple"],
    "attention": ["full", "swa", "fox", "fox_pro", "diff_attention", "deltaformer", "path", "path_fox", "simplicial",
                  "lolcats", "liger", "hymba", "lfm2_conv"],
}
METRICS = ("validation_bits_per_byte",)


def main() -> int:
    """Run the pieces that are asked for, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mixers"))
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="points at a time, one core per point (default 1)")
    parser.add_argument("--collect", action="store_true", help="train nothing, write what there is")
    args = parser.parse_args()
    sweeps = {args.out / piece: ["sweep=mixers", f"sweep.name=mixers_{piece}",
                                 f"model.schedule.linear={','.join(PIECES[piece])}"] for piece in args.pieces}
    code, _ = run_sweeps(sweeps, args.jobs, args.collect)
    _, every = run_sweeps({args.out / piece: [] for piece in PIECES}, args.jobs, collect=True)
    write_tables(args.out, every, METRICS)
    print(f"{args.out}/table.md, {args.out}/results.csv")
    return code


if __name__ == "__main__":
    sys.exit(main())
