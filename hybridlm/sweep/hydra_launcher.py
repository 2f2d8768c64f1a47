"""Gives points to one of Hydra's launchers, which runs each as a job: `python -m hybridlm.sweep.hydra_launcher JOBS`.

A process of its own, because a launcher waits for its jobs, and Hydra and Ray each want a process for themselves.
JOBS/launch.json says what to launch:

    {"launcher": "slurm", "options": {...}, "name": "hybrid_ratio", "cwd": "...", "points": [run folders]}

A job only starts the ordinary process of its point; Hydra's multirun has no part in training. Code of the user's own
comes with `--import`, never from a file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from hydra import compose, initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.sweep.folder import LAUNCH_FILE, OUTCOME_FILE, STOP_FILE
from hybridlm.sweep.process import PointProcess, finish_point, start_point

POLL_INTERVAL_S = 0.5  # between checks of a job whether its point has ended
# Launcher: its plugin, its name in Hydra's group hydra/launcher, and where its options stand in its config.
LAUNCHERS = {"slurm": ("hydra_plugins.hydra_submitit_launcher", "submitit_slurm", "hydra.launcher"),
             "ray": ("hydra_plugins.hydra_ray_launcher", "ray", "hydra.launcher.ray")}
RESERVED_OPTIONS = ("_target_", "submitit_folder", "stderr_to_stdout")  # options that a sweep sets itself
SINGLE_PROCESS_OPTIONS = ("nodes", "tasks_per_node")  # must be 1: a point is one process
POSITIVE_OPTIONS = (*SINGLE_PROCESS_OPTIONS, "timeout_min", "cpus_per_task", "mem_gb", "array_parallelism",
                    "cpus_per_gpu")


def build_launcher_config(launcher: str, options: Mapping[str, Any], folder: Path, name: str = "sweep") -> DictConfig:
    """Build Hydra's config of a launcher with these options, checked against the launcher's own schema.

    Args:
        launcher: slurm or ray.
        options: the options of the launcher, as in `sweep.slurm` or `sweep.ray`.
        folder: jobs/N in the folder of the sweep.
        name: name of the jobs.

    Raises:
        ConfigError: the launcher is not installed; an option that it does not have, or of the wrong type.
    """
    plugin, group, node = LAUNCHERS[launcher]
    try:
        import_module(plugin)
    except ImportError:
        raise ConfigError("sweep.launcher", "is not installed", got=launcher,
                          hint=f"pip install 'hybridlm[{launcher}]'") from None
    quiet = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.output_subdir=null"]
    config = compose(overrides=[f"hydra/launcher={group}", *quiet], return_hydra_config=True)
    OmegaConf.set_struct(config, True)
    with_name = {"name": name, **options} if launcher == "slurm" else options
    target = OmegaConf.select(config, node)
    known = [str(key) for key in target if key not in RESERVED_OPTIONS]
    for key, value in with_name.items():
        path = f"sweep.{launcher}.{key}"
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(path, "is no option of Hydra's launcher", expected="" if hint else ", ".join(known),
                              hint=hint)
        if key in SINGLE_PROCESS_OPTIONS and value != 1:
            raise ConfigError(path, "must be 1: a point is one process", got=value)
        try:
            target[key] = value
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(path, str(error).splitlines()[0]) from None
        if key in POSITIVE_OPTIONS and isinstance(target[key], int) and target[key] < 1:
            raise ConfigError(path, "must be positive", got=value)
    if launcher == "slurm":
        limit_s, warning_s = 60 * target.timeout_min, target.signal_delay_s
        if limit_s <= warning_s:
            raise ConfigError("sweep.slurm.timeout_min", f"is over before the point has started: Slurm warns it "
                              f"{warning_s} s before the end (sweep.slurm.signal_delay_s)", got=target.timeout_min,
                              expected=f"at least {warning_s // 60 + 1}")
        target.submitit_folder = str(folder)
    OmegaConf.update(config, "hydra.sweep", {"dir": str(folder), "subdir": "."})
    return config


def check_launcher(launcher: str, options: Mapping[str, Any]) -> None:
    """Check the options of a launcher before anything is submitted.

    Raises:
        ConfigError: like `build_launcher_config`.
    """
    if launcher != "local":
        with initialize(version_base=None):
            build_launcher_config(launcher, options, Path())


def launch_points(folder: Path, imports: Sequence[str] = ()) -> None:
    """Launch the points that launch.json in `folder` names, and wait until all have ended."""
    from hydra._internal.callbacks import Callbacks  # what every launcher is set up with has no public name
    from hydra.types import HydraContext

    asked = json.loads((folder / LAUNCH_FILE).read_text(encoding="utf-8"))
    with initialize(version_base=None):
        config = build_launcher_config(asked["launcher"], asked["options"], folder, asked["name"])
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=partial(run_job, folder, imports), config=config)
        launcher.launch([[f"+point={index}"] for index in range(len(asked["points"]))], 0)


def run_job(folder: Path, imports: Sequence[str], config: DictConfig) -> None:
    """Run one job: a point from its start to its outcome. The launcher calls this on the machine that it chooses.

    Args:
        folder: jobs/N in the folder of the sweep.
        imports: files and modules that register kinds of the user's own.
        config: the index of the point in launch.json, as `point`.
    """
    if (folder / STOP_FILE).exists():
        return
    asked = json.loads((folder / LAUNCH_FILE).read_text(encoding="utf-8"))
    run_dir = Path(asked["points"][config.point])
    (run_dir / OUTCOME_FILE).unlink(missing_ok=True)  # of this job before it was requeued
    point = start_point(run_dir, cwd=asked["cwd"], imports=imports)
    _save_when_warned(point)
    try:
        while point.process.poll() is None:
            if (folder / STOP_FILE).exists():
                _let_save(point)
            time.sleep(POLL_INTERVAL_S)
    except Exception:  # the launcher interrupts a job whose time is over; SystemExit passes: the job is started again
        _let_save(point)
    finish_point(point, asked_to_stop=True)


def _save_when_warned(point: PointProcess) -> None:
    """Let the point save when Slurm warns that the time of the job is over.

    The warning is SIGUSR2; submitit answers it by ending the job, or by having it started again.
    """
    before = signal.getsignal(signal.SIGUSR2)

    def handle(number: int, frame: FrameType | None) -> None:
        _let_save(point)
        before(number, frame)  # type: ignore[operator, misc]

    if callable(before):
        signal.signal(signal.SIGUSR2, handle)


def _let_save(point: PointProcess) -> None:
    point.signal(signal.SIGTERM)
    point.process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Launch what the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hybridlm.sweep.hydra_launcher")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="FILE")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGUSR1, lambda *_: (args.folder / STOP_FILE).touch())  # the sweep was killed: points save
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use over the network otherwise
    try:
        launch_points(args.folder, args.imports)
    except Exception as error:  # the sweep shows the last line of what this process prints
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
