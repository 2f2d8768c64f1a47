"""The results of a pilot, as pilot.json has them, and the learning rates that a ladder may train with.

A rate is the best for one rung, base, parametrization and optimizer. A ladder with others is refused, and so is one
with an architecture for which no rate is known: it would train beside tuned ones with a rate that nobody has tuned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import ConfigError, require
from hybridlm.ladder.request import LadderConfig
from hybridlm.ladder.rungs import RungConfig
from hybridlm.model.parametrization import Kind
from hybridlm.optimizers import OptimizerConfig

PILOT_FILE = "pilot.json"
RATE_KEY = "optimizer.lr"
WITHOUT_PILOT = "train with optimizer.lr: ladder.pilot.use=false"


@dataclass(kw_only=True)
class RateResult:
    """Losses of the trainings at one learning rate.

    Args:
        lr: the learning rate.
        loss: mean over seeds, in bits per byte; null where a training diverged, or none has a result.
        losses: by seed.
        diverged: number of trainings that diverged.
    """

    lr: float
    loss: float | None
    losses: list[float]
    diverged: int

    def __post_init__(self) -> None:
        require(math.isfinite(self.lr) and self.lr > 0, "lr", "must be positive and finite", got=self.lr)
        for loss in (self.loss, *self.losses):
            require(loss is None or math.isfinite(loss), "loss", "must be finite", got=loss)
        require(self.diverged >= 0, "diverged", "must not be negative", got=self.diverged)


@dataclass(kw_only=True)
class TunedArchitecture:
    """Results of a pilot for one architecture.

    Args:
        optimizer: settings of its optimizer, without the learning rate.
        centres: learning rates around which it was searched.
        rates: results, by ascending learning rate.
        best: the learning rate with the least loss; null where there is none.
        at_edge: whether that is the least or the greatest of `rates`.
        missing: trainings without a result that have not diverged either.
    """

    optimizer: dict[str, Any]
    centres: list[float]
    rates: list[RateResult]
    best: float | None
    at_edge: bool
    missing: list[str]

    def __post_init__(self) -> None:
        known = [row.lr for row in self.rates if row.loss is not None]
        require(self.best in known if known else self.best is None, "best", "is no rate with a loss", got=self.best)


@dataclass(kw_only=True)
class PilotReport:
    """The content of pilot.json.

    Args:
        rung: the rung that it trained at.
        base: the rung for which its learning rates are meant.
        parametrization: how they were carried from the base to the rung.
        seeds: of every learning rate.
        architectures: what was found, by name in the ladder.
        warnings: what a person should read.
    """

    rung: RungConfig
    base: RungConfig
    parametrization: Kind
    seeds: list[int]
    architectures: dict[str, TunedArchitecture]
    warnings: list[str]

    def only(self, names: Iterable[str]) -> PilotReport:
        """The report of these architectures alone; pilot.json also keeps those of earlier pilots in its folder."""
        return replace(self, architectures={name: self.architectures[name] for name in names})

    @property
    def missing(self) -> list[str]:
        """Trainings of all architectures without a result."""
        return [each for found in self.architectures.values() for each in found.missing]

    @property
    def untuned(self) -> list[str]:
        """Architectures for which all learning rates diverged."""
        return [name for name, found in self.architectures.items() if found.best is None and not found.missing]


def read_pilot(folder: Path) -> PilotReport | None:
    """Read pilot.json in the folder of a ladder; None where there was no pilot.

    Raises:
        ConfigError: a file that no pilot wrote.
    """
    file = folder / PILOT_FILE
    if not file.exists():
        return None
    try:
        return from_dict(PilotReport, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        said = f"{error.key}: {error.what}" if isinstance(error, ConfigError) else "no JSON"
        raise ConfigError("ladder.dir", f"holds a pilot that cannot be read ({said})", got=str(file),
                          hint="delete it: the same command with --pilot writes it again") from None


def read_own_pilot(ladder: LadderConfig) -> PilotReport | None:
    """Read the pilot in the folder of a ladder, and check that its rates are meant for this ladder's smallest rung.

    Raises:
        ConfigError: its rung, base or parametrization is another, or it cannot be read.
    """
    report = read_pilot(ladder.folder)
    if report is None:
        return None
    for key, before, now in (("ladder.rungs", to_dict(report.rung), to_dict(ladder.sizes[0])),
                             ("ladder.base", to_dict(report.base), to_dict(ladder.base_size)),
                             ("ladder.parametrization", {"": report.parametrization}, {"": ladder.parametrization})):
        if before != now:
            raise ConfigError(key, "is not that of the pilot in the folder of the ladder",
                              got=_describe_changes(now, before), expected=_describe_changes(before, now),
                              hint=f"take another ladder.dir=..., or {WITHOUT_PILOT}")
    return report


def usable_pilot(ladder: LadderConfig) -> PilotReport | None:
    """The pilot whose best rates a ladder trains with; None without one, or with ladder.pilot.use=false.

    Raises:
        ConfigError: it has not finished, has no rate for an architecture, or is not meant for this ladder.
    """
    report = read_own_pilot(ladder) if ladder.pilot.use else None
    if report is None:
        return None
    for name in ladder.architectures:
        found = report.architectures.get(name)
        if found is None:
            raise ConfigError("ladder.dir", f"holds a pilot without the architecture {name}", got=str(ladder.folder),
                              hint=f"give the same command with --pilot, or {WITHOUT_PILOT}")
        if found.missing:
            raise ConfigError("ladder.dir", "holds a pilot that has not finished", got=found.missing[0],
                              hint=f"go on with it (--pilot), or {WITHOUT_PILOT}")
        if found.best is None:
            raise ConfigError("ladder.dir", f"holds a pilot in which {name} diverged at every rate",
                              got=", ".join(f"{row.lr:g}" for row in found.rates),
                              hint=f"{lower_rates(name, found)}, or {WITHOUT_PILOT}")
    return report


def best_rate(ladder: LadderConfig, name: str, optimizer: OptimizerConfig) -> float | None:
    """The best learning rate of an architecture by the pilot of its ladder; None where none is used.

    Args:
        ladder: the ladder.
        name: one of its architectures.
        optimizer: of that architecture, as if there were no pilot.

    Raises:
        ConfigError: the pilot had another optimizer, or did not search around the learning rate of this one, or is not
            usable.
    """
    report = usable_pilot(ladder)
    if report is None:
        return None
    found = report.architectures[name]
    before, now = found.optimizer, optimizer_settings(optimizer)
    if before != now:
        raise ConfigError("optimizer", f"is not that of the pilot of {name}", got=_describe_changes(now, before),
                          expected=_describe_changes(before, now),
                          hint=f"take another ladder.dir=..., or {WITHOUT_PILOT}")
    if optimizer.lr not in found.centres:
        raise ConfigError(RATE_KEY, f"would have no effect: {name} trains with the best rate of the pilot, "
                          f"{found.best:g}", got=optimizer.lr, hint=f"leave it out, or {WITHOUT_PILOT}")
    return found.best


def optimizer_settings(optimizer: OptimizerConfig) -> dict[str, Any]:
    """The settings of an optimizer as plain data, without the learning rate."""
    return {key: value for key, value in to_dict(optimizer).items() if key != "lr"}


def lower_rates(name: str, found: TunedArchitecture) -> str:
    """Say with which word a pilot tries lower rates."""
    return (f"add ladder.architectures.{name}.{RATE_KEY}={found.rates[0].lr / 4:g} to the command of the pilot for "
            "lower rates")


def describe_use(ladder: LadderConfig) -> list[str]:
    """Say which learning rates come from the pilot.

    Raises:
        ConfigError: as `usable_pilot`.
    """
    report = usable_pilot(ladder)
    if report is None:
        return []
    listed = ", ".join(f"{name} {report.architectures[name].best:g}" for name in ladder.architectures)
    return [f"learning rates of the pilot: {listed} (ladder.pilot.use=false trains with optimizer.lr)"]


def _describe_changes(data: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The values of `data` that `other` has not, in words.

    >>> _describe_changes({"kind": "lion", "lr": 1.0}, {"kind": "adamw", "lr": 1.0})
    'kind=lion'
    """
    return ", ".join(f"{key}={value}".removeprefix("=") for key, value in data.items()
                     if key not in other or other[key] != value) or "nothing"
