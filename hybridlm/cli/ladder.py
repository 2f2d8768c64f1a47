"""`hybridlm ladder`: architectures compared over sizes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.cli.parser import Parser, printer, read_integers
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from hybridlm.ladder.plan import LadderPlan
    from hybridlm.ladder.request import LadderConfig

PIPED_WIDTH = 110
WIDTHS = "64,128,256"  # of the coordinate check
CHECK_SEEDS = 4


def run(argv: Sequence[str]) -> int:
    """Show, run or refit a ladder, or check its coordinates; returns the exit code."""
    parser = Parser("ladder", "Architectures at several sizes, with hyperparameters that are carried from the "
                              "smallest: how losses fall with compute, paired differences, laws and verdicts. The "
                              "same command goes on with a ladder that was stopped.", """\
  hybridlm ladder ladder=tiny --dry-run
  hybridlm ladder ladder=tiny --pilot
  hybridlm ladder ladder=tiny ladder.seeds=0,1,2
  hybridlm ladder ladder.dir=runs/ladders/tiny --fit-only ladder.fit.asymptote=0.5
  hybridlm ladder ladder=tiny --check-coordinates""")
    parser.add_overrides("all points; ladder=NAME and ladder.KEY=... are the ladder's own")
    parser.add_argument("--dry-run", action="store_true", help="show the points and what they cost, run nothing")
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=None,
                        help="estimate times from steps measured on this machine (default: where that takes seconds), "
                             "or from FLOPs alone")
    parser.add_argument("--jobs", type=int, metavar="N", help="points at a time on this machine (default 1)")
    parser.add_argument("--retry-failed", action="store_true", help="start failed points again")
    parser.add_argument("--fit-only", action="store_true", help="run nothing: fit and judge what has finished")
    parser.add_argument("--pilot", action="store_true",
                        help="search the learning rate of every architecture at the smallest rung (ladder.pilot.*); "
                             "the rungs of the same ladder then train with the best")
    parser.add_argument("--check-coordinates", action="store_true",
                        help="train each architecture for a few steps at several widths, and say whether activations "
                             "and their changes keep their size")
    parser.add_argument("--widths", metavar="N,N,...",
                        help=f"hidden sizes of --check-coordinates (default {WIDTHS})")
    parser.add_argument("--check-seeds", type=int, metavar="N",
                        help=f"seeds of --check-coordinates (default {CHECK_SEEDS})")
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    try:
        return _run_command(args, argv)
    except ConfigError as error:  # of the sweep that runs the points: its keys are the ladder's here
        raise error.renamed("sweep.", "ladder.") from None


def _run_command(args: argparse.Namespace, argv: Sequence[str]) -> int:
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError("--jobs", "must be positive", got=args.jobs)
    chosen = [name for name, value in (("--dry-run", args.dry_run), ("--fit-only", args.fit_only),
                                       ("--check-coordinates", args.check_coordinates)) if value]
    if args.pilot:
        chosen = [*(name for name in chosen if name != "--dry-run"), "--pilot"]
    if len(chosen) > 1:
        raise ConfigError(chosen[1], f"cannot stand beside {chosen[0]}", expected="one of them")
    for name, value in (("--widths", args.widths), ("--check-seeds", args.check_seeds)):
        if value is not None and not args.check_coordinates:
            raise ConfigError(name, "goes with --check-coordinates", got=value)
    if args.fit_only:
        return _fit_only(args)
    if args.check_coordinates:
        return _check_coordinates(args)
    return _pilot(args, argv) if args.pilot else _run(args, argv)


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    from hybridlm.ladder.plan import make_ladder_plan
    from hybridlm.ladder.request import read_ladder_request

    plan = make_ladder_plan(read_ladder_request(args.overrides, args.config_dir))
    return _execute(args, argv, plan, lambda costs: _tell(args, plan.sweep.folder, plan.ladder, costs))


def _execute(args: argparse.Namespace, argv: Sequence[str], plan: LadderPlan,
             tell: Callable[[dict[str, dict[str, Any]]], None]) -> int:
    """Show a ladder, run it unless only the plan is asked for, and tell what came out; returns the exit code.

    Args:
        args: of the command.
        argv: its words, which are printed where it stops.
        plan: the ladder, or its pilot.
        tell: gets the costs of the points.
    """
    from hybridlm.ladder.analysis import describe_ladder
    from hybridlm.sweep.execute import check_jobs, describe_with_times, execute
    from hybridlm.sweep.folder import check_owner

    check_owner(plan.sweep)
    check_jobs(plan.sweep, args.jobs)
    shown = describe_with_times(plan.sweep, measure=args.measure, jobs=args.jobs) | {"ladder": describe_ladder(plan)}
    if not (args.json and args.dry_run):
        _show_plan(shown, args)
    if args.dry_run:
        if args.json:
            print(json.dumps(shown))
        return 0
    return execute(plan.sweep, shown, command=["hybridlm", "ladder", *argv], jobs=args.jobs,
                   retry_failed=args.retry_failed, say=printer(args.json),
                   collect=lambda: tell(shown["ladder"]["costs"]))


def _pilot(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Search learning rates; a rate at which training diverges is a result, and no failure unless all of them do."""
    from hybridlm.config.serialization import to_dict
    from hybridlm.ladder.analysis import describe_points
    from hybridlm.ladder.pilot import judge_pilot, pilot_request, plan_rates
    from hybridlm.ladder.plan import architecture_config, make_ladder_plan
    from hybridlm.ladder.request import read_ladder_request
    from hybridlm.ladder.table import print_pilot

    request = read_ladder_request(args.overrides, args.config_dir)
    ladder = request.ladder
    untuned = replace(request, ladder=replace(ladder, pilot=replace(ladder.pilot, use=False)))
    optimizers = {name: architecture_config(untuned, name).optimizer for name in ladder.architectures}
    tried = plan_rates(ladder, {name: optimizer.lr for name, optimizer in optimizers.items()})
    plan = make_ladder_plan(pilot_request(untuned, tried))
    without: list[str] = []  # points and architectures without a result

    def tell(costs: dict[str, dict[str, Any]]) -> None:
        report = judge_pilot(ladder, optimizers, tried, describe_points(plan.sweep.folder, plan.ladder, costs))
        own = report.only(ladder.architectures)
        without.extend([*own.missing, *own.untuned])
        if args.json:
            print(json.dumps(to_dict(report)))
        else:
            print_pilot(own, _console())

    code = _execute(args, argv, plan, tell)
    return code if without else 0


def _fit_only(args: argparse.Namespace) -> int:
    """Fit and judge again; only settings of the fit and the gate may differ from those of the folder."""
    from hybridlm.config.serialization import to_dict
    from hybridlm.ladder.analysis import read_ladder
    from hybridlm.ladder.request import read_ladder_request

    overrides = [word.removeprefix("++").removeprefix("+") for word in args.overrides]
    words = {word.partition("=")[0]: word.partition("=")[2] for word in overrides}
    if "ladder.dir" in words:
        folder = Path(words["ladder.dir"]).expanduser()
    else:
        folder = read_ladder_request(overrides, args.config_dir).ladder.folder
    settings, costs = read_ladder(folder)
    own = [word for word in overrides if word.startswith(("ladder.fit.", "ladder.gate.", "ladder.reference="))]
    strange = [word for word in overrides if word not in own and not word.startswith(("ladder=", "ladder.dir="))]
    if strange:
        key, _, value = strange[0].partition("=")
        raise ConfigError(key, "cannot change without new runs", got=value,
                          expected="with --fit-only: ladder.fit.*, ladder.gate.* or ladder.reference")
    ladder = read_ladder_request(own, saved=to_dict(settings)).ladder
    _tell(args, folder, ladder, costs)
    return 0


def _show_plan(shown: dict[str, Any], args: argparse.Namespace) -> None:
    from hybridlm.ladder.table import print_ladder_plan

    print_ladder_plan(shown, _console(stderr=args.json))


def _tell(args: argparse.Namespace, folder: Path, ladder: LadderConfig, costs: dict[str, dict[str, Any]]) -> None:
    """Analyse what has finished, and print it: JSON, or tables."""
    from hybridlm.ladder.analysis import RESULT_FILE, analyse
    from hybridlm.ladder.table import print_ladder

    report = analyse(folder, ladder, costs)
    if args.json:
        print(json.dumps(report))
    else:
        print_ladder(report, _console())
    finished = sum(row["loss"] is not None for row in report["points"])
    say = printer(args.json)
    say(f"{finished} of {len(report['points'])} points have a result; {folder}/{RESULT_FILE}, {folder}/results.csv")
    if finished:
        say(f"try: hybridlm report {folder}")


def _check_coordinates(args: argparse.Namespace) -> int:
    from hybridlm.ladder.coordinate_report import check_ladder, print_check
    from hybridlm.ladder.request import read_ladder_request

    widths = read_integers("--widths", args.widths or WIDTHS, WIDTHS)
    request = read_ladder_request(args.overrides, args.config_dir)
    report = check_ladder(request, widths, say=printer(True),
                          seeds=CHECK_SEEDS if args.check_seeds is None else args.check_seeds)
    if args.json:
        print(json.dumps(report))
    else:
        print_check(report, _console())
    return 0 if report["passes"] else 1


def _console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or, where the text goes elsewhere, as the widest table."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, PIPED_WIDTH))
