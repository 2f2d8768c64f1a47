"""`hybridlm report`: figures and tables of a run, a sweep, or several runs beside one another, in one page."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm.cli.parser import Parser
from hybridlm.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Write the page of a run or a sweep, or of several runs; returns the exit code."""
    parser = Parser("report", "Figures and tables of a run or a sweep, in one HTML page that needs no network. Several "
                    "runs are compared: curves over steps and tokens, config differences, final numbers.", """\
  hybridlm report runs/first
  hybridlm report runs/first runs/muon
  hybridlm report runs/sweeps/hybrid_ratio --png figures/
  hybridlm report runs/first --metric perplexity --metric bits_per_byte --output first.html
  hybridlm report runs/first --watch""")
    parser.add_argument("folders", metavar="RUN_OR_SWEEP", nargs="+",
                        help="a run folder, or the folder of a sweep; or several run folders, to compare them")
    parser.add_argument("--output", metavar="FILE", help="the page (default: report.html in the folder, of several "
                        "runs comparison.html in the first)")
    parser.add_argument("--png", metavar="DIR", help="write every figure as a PNG file too")
    parser.add_argument("--metric", action="append", default=[], metavar="NAME",
                        help="draw this metric of metrics.jsonl as well; may be given again")
    parser.add_argument("--watch", nargs="?", type=float, const=0.0, metavar="SECONDS",
                        help="write the page again when the run goes on, until Ctrl-C; the page reloads itself")
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    if args.watch is not None and (args.watch < 0 or 0 < args.watch < 1):
        raise ConfigError("--watch", "is too short", got=args.watch, expected="at least 1 second")
    from hybridlm.report.build import write_report
    from hybridlm.report.watch import LOOK_EVERY_S, watch

    every = args.watch or LOOK_EVERY_S

    def write(again: bool) -> dict[str, Any]:
        return write_report(args.folders, output=args.output, png=args.png, metrics=args.metric,
                            refresh=max(1, round(every)) if again else None)

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    if args.watch is None:
        result = write(False)
    else:
        result = watch([Path(folder).expanduser() for folder in args.folders], write, every=every, say=say)
    if args.json:
        print(json.dumps(result))
        return 0
    if "final" in result:
        _show_comparison(result)
    for note in result["notes"]:
        say(note)
    say(f"{len(result['figures'])} figures: {result['page']}" + (f", {args.png}/*.png" if result["png"] else ""))
    return 0


def _show_comparison(result: dict[str, Any]) -> None:
    """Print final numbers and differing settings of the runs, a column for each."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hybridlm.report.comparison import tables

    console = Console(highlight=False)
    for title, table in tables(result["final"], result["differences"]):
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(table.header):
            drawn.add_column(escape(name), justify="right" if index else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*map(escape, row))
        console.print(title, style="bold", markup=False)
        console.print(drawn)
