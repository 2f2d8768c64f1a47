"""Points handed to one of Hydra's launchers, which runs each as a job: `python -m hybridlm.sweep.launch JOBS`.

A process of its own, because a launcher waits for its jobs, and Hydra and Ray each want a process for themselves.
JOBS/launch.json says what is to be launched:

    {"launcher": "slurm", "options": {...}, "name": "hybrid_ratio", "cwd": "...", "points": [run folders]}

A job does nothing but start the ordinary process of its point; Hydra's multirun has no part in training.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
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
from hybridlm.sweep.process import PointProcess, finish, start

LAUNCH_FILE, STOP_FILE = "launch.json", "stop"
PAUSE = 0.5  # seconds between looks of a job at its point
# Launcher: its plugin, its name in Hydra's group hydra/launcher, and where its options stand in its config.
LAUNCHERS = {"slurm": ("hydra_plugins.hydra_submitit_launcher", "submitit_slurm", "hydra.launcher"),
             "ray": ("hydra_plugins.hydra_ray_launcher", "ray", "hydra.launcher.ray")}
OURS = ("_target_", "submitit_folder", "stderr_to_stdout")  # of Hydra's options, those that a sweep sets itself
ONE = ("nodes", "tasks_per_node")  # a point is one process
POSITIVE = (*ONE, "timeout_min", "cpus_per_task", "mem_gb", "array_parallelism", "cpus_per_gpu")


def launcher_config(launcher: str, options: Mapping[str, Any], folder: Path, name: str = "sweep") -> DictConfig:
    """Hydra's config of a launcher with these options, checked against the launcher's own schema.

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
    known = [str(key) for key in target if key not in OURS]
    for key, value in with_name.items():
        path = f"sweep.{launcher}.{key}"
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(path, "is no option of Hydra's launcher", expected="" if hint else ", ".join(known),
                              hint=hint)
        if key in ONE and value != 1:
            raise ConfigError(path, "must be 1: a point is one process", got=value)
        try:
            target[key] = value
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(path, str(error).splitlines()[0]) from None
        if key in POSITIVE and isinstance(target[key], int) and target[key] < 1:
            raise ConfigError(path, "must be positive", got=value)
    if launcher == "slurm":
        config.hydra.launcher.submitit_folder = str(folder)
    OmegaConf.update(config, "hydra.sweep", {"dir": str(folder), "subdir": "."})
    return config


def check_launcher(launcher: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError where `launcher_config` does."""
    if launcher != "local":
        with initialize(version_base=None):
            launcher_config(launcher, options, Path())


def launch(folder: Path) -> None:
    """Launch what `folder` says, and wait until all of it has ended."""
    from hydra._internal.callbacks import Callbacks  # what every launcher is set up with has no public name
    from hydra.types import HydraContext

    asked = json.loads((folder / LAUNCH_FILE).read_text(encoding="utf-8"))
    with initialize(version_base=None):
        config = launcher_config(asked["launcher"], asked["options"], folder, asked["name"])
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=partial(job, folder),
                                                           config=config)
        launcher.launch([[f"+point={index}"] for index in range(len(asked["points"]))], 0)


def job(folder: Path, config: DictConfig) -> None:
    """One job: a point from its start to its outcome. Runs where the launcher puts it."""
    if (folder / STOP_FILE).exists():
        return
    asked = json.loads((folder / LAUNCH_FILE).read_text(encoding="utf-8"))
    point = start(Path(asked["points"][config.point]), cwd=asked["cwd"])
    _save_when_warned(point)
    try:
        while point.process.poll() is None:
            if (folder / STOP_FILE).exists():
                _let_save(point)
            time.sleep(PAUSE)
    except Exception:  # its time is over; a SystemExit passes: the scheduler starts this job again
        _let_save(point)
    finish(point, asked_to_stop=True)


def _save_when_warned(point: PointProcess) -> None:
    """Slurm warns a job before its time is over with SIGUSR2, which submitit answers by leaving, or by having the job
    started again: the point saves first."""
    before = signal.getsignal(signal.SIGUSR2)

    def handle(number: int, frame: FrameType | None) -> None:
        _let_save(point)
        before(number, frame)  # type: ignore[operator, misc]

    if callable(before):
        signal.signal(signal.SIGUSR2, handle)


def _let_save(point: PointProcess) -> None:
    point.signal(signal.SIGTERM)
    point.process.wait()


def main(folder: Path) -> int:
    signal.signal(signal.SIGUSR1, lambda *_: (folder / STOP_FILE).touch())  # the sweep is gone: its points save
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray's report of itself over the network
    try:
        launch(folder)
    except Exception as error:  # the last line of the log is what the sweep tells
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
