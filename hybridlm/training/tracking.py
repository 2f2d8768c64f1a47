"""Weights & Biases, when asked for. It never stops a run."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from hybridlm.config.schema import TrackingConfig
from hybridlm.errors import ConfigError

log = logging.getLogger("hybridlm")
INIT_TIMEOUT_S = 10  # without a network wandb waits about twice as long before it gives up


class Tracker:
    """Sends records nowhere, as with `tracking.wandb=off`."""

    def log(self, record: dict[str, Any], step: int) -> None:
        """Send the record of one step."""

    def close(self) -> None:
        """End the tracked run."""


class WandbTracker(Tracker):
    """Sends records to one wandb run per training run; resumed sessions continue it."""

    def __init__(self, run: Any):
        self.run = run

    def log(self, record: dict[str, Any], step: int) -> None:
        """Send the record of one step."""
        try:
            self.run.log({key: value for key, value in record.items() if not isinstance(value, list | None)}, step=step)
        except Exception as error:
            log.warning("wandb refused a record: %s", error)

    def close(self) -> None:
        """End the tracked run."""
        try:
            self.run.finish()
        except Exception as error:
            log.warning("wandb did not finish: %s", error)


def check_tracking(config: TrackingConfig) -> None:
    """Raise ConfigError where wandb is asked for and not installed."""
    if config.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError("tracking.wandb", "needs the wandb package", got=config.wandb, expected="off",
                          hint="pip install 'hybridlm[wandb]'")


def make_tracker(config: TrackingConfig, run_dir: Path, run_config: dict[str, Any],
                 run_id: str | None = None) -> Tracker:
    """Return the tracker the config asks for; WANDB_MODE in the environment wins over `online` and `offline`.

    Online without a network becomes offline, with a warning: `wandb sync` sends it later.
    """
    if config.wandb == "off":
        return Tracker()
    import wandb

    mode = os.environ.get("WANDB_MODE", config.wandb)
    options: dict[str, Any] = {"project": config.project, "name": config.run_name or run_dir.name, "id": run_id,
                               "dir": str(run_dir), "config": run_config, "resume": "allow" if run_id else None}
    settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, console="off", silent=True)
    try:
        return WandbTracker(wandb.init(mode=mode, settings=settings, **options))  # type: ignore[arg-type]
    except Exception as error:
        if mode != "online":
            log.warning("wandb could not start (%s): this run is not tracked", error)
            return Tracker()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("wandb cannot be reached (%s): tracking offline; `wandb sync %s/wandb/offline-run-*` sends it "
                    "later", reason, run_dir)
    try:
        return WandbTracker(wandb.init(mode="offline", settings=settings, **options))
    except Exception as error:
        log.warning("wandb could not start offline either (%s): this run is not tracked", error)
        return Tracker()
