"""Runs the points of a plan by its launcher, then collects, and says what failed or is left."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.sweep.cluster_runner import run_on_cluster
from hybridlm.sweep.estimate import estimate
from hybridlm.sweep.folder import SweepFolder, point_outcome
from hybridlm.sweep.hydra_launcher import check_launcher
from hybridlm.sweep.local_runner import run_points
from hybridlm.sweep.plan import SweepPlan
from hybridlm.sweep.progress import Progress
from hybridlm.sweep.table import describe_plan
from hybridlm.user_code import imported_user_code


def check_jobs(plan: SweepPlan, jobs: int | None) -> None:
    """Refuse options that the launcher of a plan does not take.

    Args:
        plan: the sweep.
        jobs: `--jobs`; None: not given.

    Raises:
        ConfigError: jobs beside a cluster, or a launcher that is not installed or gets wrong options.
    """
    if plan.sweep.launcher != "local":
        if jobs is not None:
            raise ConfigError("--jobs", "goes with sweep.launcher=local", got=jobs)
        check_launcher(plan.sweep.launcher, plan.sweep.launcher_options)


def describe_with_times(plan: SweepPlan, *, measure: bool | None, jobs: int | None) -> dict[str, Any]:
    """Describe a plan as plain data, with the status of every point and how long it will take.

    Args:
        plan: the sweep.
        measure: measure steps on this machine; None: where it takes seconds and the points run here.
        jobs: points at a time; None: one on this machine, all on a cluster.
    """
    local = plan.sweep.launcher == "local"
    # Steps of this machine say little of a cluster's: there they are measured only where that is asked for.
    seconds, how = estimate(plan.points, measure=measure if local else bool(measure))
    at_once = jobs or (1 if local else len(plan.points))
    return describe_plan(plan, seconds, how, [point_outcome(point)["status"] for point in plan.points], at_once)


def execute(plan: SweepPlan, shown: dict[str, Any], *, command: Sequence[str], jobs: int | None, retry_failed: bool,
            say: Callable[[str], None], collect: Callable[[], None]) -> int:
    """Run the points that have not finished, collect, and say what failed or is left.

    Args:
        plan: the sweep.
        shown: of `describe_with_times`; it is written to sweep.json.
        command: the words that started this, to be typed again.
        jobs: points at a time on this machine.
        retry_failed: start failed points again.
        say: gets a line for everything that happens.
        collect: called at the end, also after a stop.

    Returns:
        The exit code: 1 where a point failed or did not finish without being asked to stop.

    Raises:
        ConfigError: the folder belongs to another sweep, or another process runs it.
    """
    progress = Progress(plan.points, [row["estimated_seconds"] for row in shown["points"]], shown["jobs"], say)
    with closing(SweepFolder(plan)) as folder:
        folder.write_plan({**shown, "command": shlex.join(command)})
        if plan.sweep.launcher == "local":
            stopped = run_points(plan.points, jobs=jobs or 1, retry_failed=retry_failed, say=say,
                                 imports=imported_user_code(), progress=progress)
        else:
            stopped = run_on_cluster(plan, retry_failed=retry_failed, say=say, imports=imported_user_code(),
                                     progress=progress)
        ended = [(point.name, point_outcome(point)) for point in plan.points]
        failed = [(name, end) for name, end in ended if end["status"] == "failed"]
        try:
            collect()
        finally:
            for name, end in failed:
                say(f"failed: {name}: {end['reason']}")
            if failed:
                say(f"{len(failed)} of {len(ended)} points failed; the same command with --retry-failed starts them "
                    "again")
            if stopped:
                say(f"{stopped}: go on with: {shlex.join(command)}")
    return 1 if failed or (not stopped and any(end["status"] != "finished" for _, end in ended)) else 0
