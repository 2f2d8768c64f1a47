"""From a request to points: one checked config each, the same run never twice, equal budgets where asked."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hybridlm.config.compose import load_config
from hybridlm.config.schema import Config
from hybridlm.config.serialization import to_dict
from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.model.cost import mtp_block
from hybridlm.sweep.probes import PointWork
from hybridlm.sweep.request import Request, SweepConfig, as_value, read_request
from hybridlm.training.stages import Stage
from hybridlm.training.stages import plan as stages_of

LONGEST_NAME = 100
SEED = "training.seed"


@dataclass(kw_only=True)
class Point:
    """One run. `settings` are the varied keys; where several settings name this same run, their values stand
    together ("kda|gdn") and `same_as` lists them. `changed`: {key: [before, after]} of what matching moved."""

    name: str
    settings: dict[str, Any]
    config: Config
    same_as: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, list[Any]] = field(default_factory=dict)
    work: PointWork = field(default_factory=PointWork)

    @property
    def group(self) -> dict[str, Any]:
        """The settings without the seed: what results are averaged over."""
        return {key: value for key, value in self.settings.items() if key != SEED}

    @property
    def stages(self) -> list[Stage]:
        """Of its training on text."""
        return stages_of(self.config) if self.work.language_model else []

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Of training, on text and on probes."""
        return sum(stage.steps * stage.tokens_per_step for stage in self.stages) + sum(
            task.tokens for task in self.work.probes)


@dataclass(kw_only=True)
class SweepPlan:
    """All points of a sweep. `notes` are what a person should know before anything runs."""

    sweep: SweepConfig
    folder: Path
    vary: dict[str, list[str]]
    points: list[Point]
    notes: list[str] = field(default_factory=list)


def make_plan(words: Sequence[str], config_dir: str | None = None) -> SweepPlan:
    """The points of a command line, each with its whole config, matched as `sweep.match` asks.

    Raises:
        ConfigError: a key or value that a run does not have, an empty list, points that cannot match.
    """
    from hybridlm.sweep.match import match_points

    request = read_request(words, config_dir)
    if not request.vary:
        raise ConfigError("", "this sweep varies nothing", expected="sweep=NAME, or a list such as "
                          "model.schedule.ratio=0,1,3")
    for key in ("run_dir", "model.name", "tracking.run_name"):
        if key in request.vary:
            raise ConfigError(key, "cannot be varied: every point has its own already")
    sweep, folder = request.sweep, request.sweep.folder
    every = _points(request, folder)
    points = _collapse(every)
    notes = []
    if len(points) < len(every):
        alike = sum(1 for point in points if point.same_as)
        notes.append(f"{len(every)} combinations are {len(points)} different runs: {alike} of them stand for several "
                     "settings that name the same model (a|b)")
    notes += _data_notes(points)
    notes += match_points(points, sweep)
    return SweepPlan(sweep=sweep, folder=folder, vary=request.vary, points=points, notes=notes)


def _points(request: Request, folder: Path) -> list[Point]:
    short = short_keys(list(request.vary))
    points, names = [], Counter[str]()
    work = PointWork(probes=request.sweep.probes, language_model=request.sweep.language_model)
    for values in itertools.product(*request.vary.values()):
        pairs = dict(zip(request.vary, values, strict=True))
        words = [f"{key}={value}" for key, value in pairs.items()]
        config = load_config(request.root, [*request.fixed, *words], request.config_dir)
        name = _name({short[key]: value for key, value in pairs.items()})
        names[name] += 1
        name += f"-{names[name]}" if names[name] > 1 else ""
        config.run_dir = str(folder / "points" / name)
        config.training.resume = "auto"  # a point goes on by itself
        if config.tracking.run_name is None:
            config.tracking.run_name = f"{request.sweep.name}/{name}"
        settings = {key: as_value(value.strip("'\"")) for key, value in pairs.items()}
        points.append(Point(name=name, settings=settings, config=config, work=work))
    return points


def short_keys(keys: list[str]) -> dict[str, str]:
    """The last part of each key, with as much before it as tells the keys apart."""
    short = {}
    for key in keys:
        parts = re.split(r"[./@]", key)
        for count in range(1, len(parts) + 1):
            ending = parts[-count:]
            if sum(re.split(r"[./@]", other)[-count:] == ending for other in keys) == 1:
                break
        short[key] = ".".join(ending)
    return short


def _name(pairs: dict[str, str]) -> str:
    """A folder name that a person can read: linear-kda_ratio-3_seed-0."""
    parts = (f"{key}-{value}".replace("/", ".").removesuffix(".yaml") for key, value in pairs.items())
    name = "_".join(re.sub(r"[^\w.+-]+", "-", part).strip("-") for part in parts)
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{sha256(json.dumps(pairs).encode()).hexdigest()[:8]}"
    return name


def _collapse(points: list[Point]) -> list[Point]:
    """The first point of those whose runs would be the same."""
    first: dict[str, list[Point]] = {}
    for point in points:
        first.setdefault(identity(point.config), []).append(point)
    for alike in first.values():
        if len(alike) > 1:
            keep = alike[0]
            distinct = {json.dumps(point.settings): point.settings for point in alike}
            keep.same_as = list(distinct.values()) if len(distinct) > 1 else []
            keep.settings = {key: _together([point.settings[key] for point in alike]) for key in keep.settings}
    return [alike[0] for alike in first.values()]


def _together(values: list[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else "|".join(str(value) for value in distinct)


def identity(config: Config) -> str:
    """Equal for configs that run alike: the layers count, not how the schedule was written, nor unused mixers."""
    data, model = to_dict(config), config.model
    layers = model.layers()
    used = {*layers, *([mtp_block(model)[1]] if model.mtp.depth else [])}
    data["model"] |= {"schedule": layers, "name": "",
                      "mixers": {name: data["model"]["mixers"][name] for name in sorted(used)}}
    data["run_dir"] = data["tracking"]["run_name"] = ""
    return json.dumps(data, sort_keys=True, default=str)


def _data_notes(points: list[Point]) -> list[str]:
    """All points of a seed should read the same tokens in the same order; where they do not, say so."""
    orders = set()
    for point in points:
        config = point.config
        data = {key: value for key, value in to_dict(config.data).items() if key != "cache_dir"}
        windows = [(stage.sequence_length, stage.batch_size) for stage in stages_of(config)]
        orders.add(json.dumps([data, windows, config.model.mtp.depth], sort_keys=True))
    if len(orders) > 1:
        return ["the points do not read the same data in the same order: their data, sequence lengths, batch sizes or "
                "prediction depths differ"]
    return ["data order: the same in all points of a seed" if any(SEED in p.settings for p in points) else
            "data order: the same in all points"]


def named(points: list[Point], name: str, key: str) -> Point:
    """The point of this name.

    Raises:
        ConfigError: there is none.
    """
    for point in points:
        if point.name == name:
            return point
    names = [point.name for point in points]
    hint = did_you_mean(name, names)
    raise ConfigError(key, "is no point of this sweep", got=name, expected="" if hint else f"such as {names[0]}",
                      hint=hint)
