"""`hybridlm report`: figures and tables of a run or a sweep, in one page."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm.cli.parser import Parser
from hybridlm.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Write the page of a run or a sweep; returns the exit code."""
    parser = Parser("report", "Figures and tables of a run or a sweep, in one HTML page that needs no network.", """\
  hybridlm report runs/first
  hybridlm report runs/sweeps/hybrid_ratio --png figures/
  hybridlm report runs/first --metric grad_norm --metric lr --output first.html
  hybridlm report runs/first --watch""")
    parser.add_argument("folder", metavar="RUN_OR_SWEEP", help="a run folder, or the folder of a sweep")
    parser.add_argument("--output", metavar="FILE", help="the page (default: report.html in the folder)")
    parser.add_argument("--png", metavar="DIR", help="write every figure as a PNG file too")
    parser.add_argument("--metric", action="append", default=[], metavar="NAME",
                        help="draw this metric of metrics.jsonl as well; may be given again")
    parser.add_argument("--watch", nargs="?", type=float, const=0.0, metavar="SECONDS",
                        help="write the page again when the run goes on, until Ctrl-C; the page reloads itself")
    parser.add_json()
    args = parser.parse_args(argv)
    if args.watch is not None and (args.watch < 0 or 0 < args.watch < 1):
        raise ConfigError("--watch", "is too short", got=args.watch, expected="at least 1 second")
    from hybridlm.report.build import write_report
    from hybridlm.report.watch import LOOK_EVERY_S, watch

    every = args.watch or LOOK_EVERY_S

    def write(again: bool) -> dict[str, Any]:
        return write_report(args.folder, output=args.output, png=args.png, metrics=args.metric,
                            refresh=max(1, round(every)) if again else None)

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    if args.watch is None:
        result = write(False)
    else:
        result = watch(Path(args.folder).expanduser(), write, every=every, say=say)
    if args.json:
        print(json.dumps(result))
        return 0
    for note in result["notes"]:
        say(note)
    say(f"{len(result['figures'])} figures: {result['page']}" + (f", {args.png}/*.png" if result["png"] else ""))
    return 0
