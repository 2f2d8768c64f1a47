"""`hybridlm export`: a checkpoint of ours becomes a folder that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hybridlm.cli.parser import Parser


def run(argv: Sequence[str]) -> int:
    """Export a checkpoint; returns the exit code."""
    parser = Parser("export", "Turn a checkpoint of ours into a folder that transformers loads.", """\
  hybridlm export runs/quickstart exported/
  hybridlm export runs/mine exported/ --dtype bf16""")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("dest", metavar="DEST", help="folder to make")
    add_weight_options(parser)
    parser.add_argument("--family", help="a transformers model type; by default the one that computes this model, or "
                                         "hybridlm where there is none")
    args = parser.parse_args(argv)
    from hybridlm.interop import export_checkpoint

    print_summary(export_checkpoint(args.checkpoint, args.dest, family=args.family, dtype=args.dtype,
                                    mtp=not args.no_mtp), args.json)
    return 0


def add_weight_options(parser: Parser) -> None:
    """Add the options that import and export share."""
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights; by default as they are")
    parser.add_argument("--no-mtp", action="store_true", help="leave multi-token prediction weights out")
    parser.add_json()


def print_summary(report: dict[str, Any], as_json: bool) -> None:
    """Print what was converted, as JSON or in words."""
    from hybridlm.interop.checkpoint_folders import summarize

    print(json.dumps(report) if as_json else summarize(report))
