"""`hybridlm sweep`: one command compares mixers and ratios."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hybridlm.cli.parser import Parser, printer
from hybridlm.errors import ConfigError, counted


def run(argv: Sequence[str]) -> int:
    """Show, run or collect a sweep; returns the exit code."""
    parser = Parser("sweep", "Many runs that differ in what is compared and in nothing else. The same command goes on "
                             "with a sweep that was stopped.", """\
  hybridlm sweep sweep=hybrid_ratio --dry-run
  hybridlm sweep model=hybrid_tiny model.schedule.linear=kda,gdn,lightning model.schedule.ratio=0,1,3,7,inf \\
      training.seed=0,1 sweep.match=params
  hybridlm sweep sweep.dir=runs/sweeps/hybrid_ratio --collect""")
    parser.add_overrides("all points; a key with several values, a,b,c, is varied; sweep=NAME and sweep.KEY=... are "
                         "the sweep's own")
    parser.add_argument("--dry-run", action="store_true", help="show the points and what they cost, run nothing")
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=None,
                        help="estimate times from steps measured on this machine (default: where that takes seconds), "
                             "or from FLOPs alone")
    parser.add_argument("--jobs", type=int, metavar="N", help="points at a time on this machine (default 1)")
    parser.add_argument("--retry-failed", action="store_true", help="start failed points again")
    parser.add_argument("--collect", action="store_true", help="only collect results of what has finished")
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError("--jobs", "must be positive", got=args.jobs)
    if args.collect:
        return _collect(args)
    from hybridlm.sweep.execute import check_jobs, describe_with_times, execute
    from hybridlm.sweep.folder import check_owner
    from hybridlm.sweep.plan import make_plan

    plan = make_plan(args.overrides, args.config_dir)
    check_owner(plan)
    check_jobs(plan, args.jobs)
    shown = describe_with_times(plan, measure=args.measure, jobs=args.jobs)
    if not (args.json and args.dry_run):
        _show(shown, args)
    if args.dry_run:
        if args.json:
            print(json.dumps(shown))
        return 0
    return execute(plan, shown, command=["hybridlm", "sweep", *argv], jobs=args.jobs, retry_failed=args.retry_failed,
                   say=printer(args.json), collect=lambda: _tell(args, plan.folder, plan.sweep.metrics))


def _show(shown: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table before anything runs."""
    from rich.console import Console

    from hybridlm.sweep.table import print_plan

    print_plan(shown, Console(stderr=args.json))


def _collect(args: argparse.Namespace) -> int:
    from hybridlm.sweep.folder import check_owner
    from hybridlm.sweep.plan import make_plan
    from hybridlm.sweep.request import read_request

    sweep = read_request(args.overrides, args.config_dir).sweep
    if any(not word.startswith(("sweep.dir=", "sweep.metrics=")) for word in args.overrides):
        check_owner(make_plan(args.overrides, args.config_dir))
    _tell(args, sweep.folder, sweep.metrics)
    return 0


def _tell(args: argparse.Namespace, folder: Any, metrics: list[str] | None) -> None:
    """Collects, and prints what there is: JSON, or the table of means over seeds."""
    from rich.console import Console

    from hybridlm.sweep.collect import collect
    from hybridlm.sweep.table import print_results

    results = collect(folder, metrics)
    if args.json:
        print(json.dumps(results))
    else:
        print_results(results, Console())
    say = printer(args.json)
    for point in results["points"]:
        if point["corrupt_lines"]:
            say(f"warning: {point['run_dir']}/metrics.jsonl: {counted(point['corrupt_lines'], 'corrupt line')} skipped")
    count = Counter(point["status"] for point in results["points"])
    others = "".join(f", {count[status]} {status}" for status in ("running", "queued", "submitted") if count[status])
    say(f"{count['finished']} of {len(results['points'])} points are finished{others}; {folder}/results.csv, "
        f"{folder}/results.json")
