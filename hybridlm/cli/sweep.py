"""`hybridlm sweep`: one command compares mixers and ratios."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hybridlm.cli.parser import Parser


def sweep_command(argv: Sequence[str]) -> int:
    parser = Parser("sweep", "Points that differ in what is compared and in nothing else, shown with their costs.", """\
  hybridlm sweep sweep=hybrid_ratio
  hybridlm sweep model=hybrid_tiny model.schedule.linear=kda,gdn,lightning model.schedule.ratio=0,1,3,7,inf \\
      training.seed=0,1 sweep.match=params""")
    parser.overrides("all points; a key with several values, a,b,c, is varied; sweep=NAME and sweep.KEY=... are the "
                     "sweep's own")
    parser.add_argument("--dry-run", action="store_true", help="show the points and what they cost")
    parser.add_argument("--measure", action="store_true", help="estimate times from a few passes of each model")
    parser.json()
    args = parser.parse_intermixed_args(argv)
    from rich.console import Console

    from hybridlm.sweep.estimate import by_flops, by_measurement
    from hybridlm.sweep.folder import check_owner, outcome
    from hybridlm.sweep.plan import make_plan
    from hybridlm.sweep.table import render, report

    plan = make_plan(args.overrides, args.config_dir)
    check_owner(plan)
    seconds, how = (by_measurement if args.measure else by_flops)(plan.points)
    shown = report(plan, seconds, how, [outcome(point)["status"] for point in plan.points], 1)
    if args.json:
        print(json.dumps(shown))
    else:
        render(shown, Console())
    return 0
