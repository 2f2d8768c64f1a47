"""Plans a sweep: one checked config per point, equal runs merged, budgets matched if `sweep.match` asks for it."""

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

from hybridlm.config.serialization import to_dict
from hybridlm.errors import ConfigError
from hybridlm.run_config import load_config
from hybridlm.sweep.match import match_points
from hybridlm.sweep.point import SEED_KEY, Point, identify_run, shorten_keys
from hybridlm.sweep.probe_tasks import PointWork
from hybridlm.sweep.request import Request, SweepConfig, read_request, to_table_value
from hybridlm.training.stages import plan_stages

NAME_MAX_CHARS = 100  # characters of the name of a point's folder; longer names are cut and end in a hash
FIXED_KEYS = ("run_dir", "model.name", "tracking.run_name")  # every point has its own already


@dataclass(kw_only=True)
class SweepPlan:
    """All points of a sweep.

    Attributes:
        sweep: the sweep's own settings.
        folder: where everything it writes goes.
        vary: the values of each varied key, as text.
        points: the runs.
        notes: sentences that a person should read before anything runs.
        other_files: names of files that may lie in the folder before the first start.
        other_run_hint: what else to do where a point in the folder has another config; empty: nothing.
    """

    sweep: SweepConfig
    folder: Path
    vary: dict[str, list[str]]
    points: list[Point]
    notes: list[str] = field(default_factory=list)
    other_files: tuple[str, ...] = ()
    other_run_hint: str = ""


def make_plan(words: Sequence[str], config_dir: str | None = None) -> SweepPlan:
    """Make the points of a command line, each with its complete config, matched if `sweep.match` asks for it.

    Args:
        words: the arguments of `hybridlm sweep`, see `read_request`.
        config_dir: a folder of the user's own config groups.

    Raises:
        ConfigError: a key or value that a run does not have, an empty list, points that cannot match.

    >>> plan = make_plan(["model=hybrid_tiny", "model.schedule.ratio=0,1"])
    >>> [(point.name, point.config.model.layers()) for point in plan.points]
    [('ratio-0', ['full', 'full', 'full', 'full']), ('ratio-1', ['kda', 'full', 'kda', 'full'])]
    """
    request = read_request(words, config_dir)
    if not request.vary:
        raise ConfigError("", "this sweep varies nothing", expected="sweep=NAME, or a list such as "
                          "model.schedule.ratio=0,1,3")
    for key in FIXED_KEYS:
        if key in request.vary:
            raise ConfigError(key, "cannot be varied: every point has its own already")
    combinations = _make_points(request)
    points = merge_same_runs(combinations)
    notes = []
    if len(points) < len(combinations):
        merged = sum(1 for point in points if point.same_as)
        notes.append(f"{len(combinations)} combinations are {len(points)} different runs: {merged} of them stand for "
                     "several settings that name the same model (a|b)")
    notes.append(_describe_data(points))
    notes += match_points(points, request.sweep)
    return SweepPlan(sweep=request.sweep, folder=request.sweep.folder, vary=request.vary, points=points, notes=notes)


def _make_points(request: Request) -> list[Point]:
    """Make one point per combination of the varied values."""
    short = shorten_keys(list(request.vary))
    work = PointWork(probes=request.sweep.probes, language_model=request.sweep.language_model)
    points = []
    name_counts = Counter[str]()
    for values in itertools.product(*request.vary.values()):
        pairs = dict(zip(request.vary, values, strict=True))
        words = [f"{key}={value}" for key, value in pairs.items()]
        config = load_config(request.root, [*request.fixed, *words], request.config_dir)
        name = _name_point({short[key]: value for key, value in pairs.items()})
        name_counts[name] += 1
        if name_counts[name] > 1:
            name += f"-{name_counts[name]}"
        config.run_dir = str(request.sweep.folder / "points" / name)
        config.training.resume = "auto"  # the same command continues a point that was stopped
        if config.tracking.run_name is None:
            config.tracking.run_name = f"{request.sweep.name}/{name}"
        settings = {key: to_table_value(value.strip("'\"")) for key, value in pairs.items()}
        points.append(Point(name=name, settings=settings, config=config, work=work))
    return points


def _name_point(pairs: dict[str, str]) -> str:
    """Make a readable name of the point's folder, such as linear-kda_ratio-3_seed-0."""
    parts = [f"{key}-{value}".replace("/", ".").removesuffix(".yaml") for key, value in pairs.items()]
    name = "_".join(re.sub(r"[^\w.+-]+", "-", part).strip("-") for part in parts)
    if len(name) > NAME_MAX_CHARS:
        name = f"{name[:NAME_MAX_CHARS]}-{sha256(json.dumps(pairs).encode()).hexdigest()[:8]}"
    return name


def merge_same_runs(points: list[Point]) -> list[Point]:
    """Merge equal runs: the first point of each stays, with the settings of all."""
    alike: dict[str, list[Point]] = {}
    for point in points:
        alike.setdefault(identify_run(point.config), []).append(point)
    for first, *others in alike.values():
        if others:
            distinct = {json.dumps(point.settings): point.settings for point in [first, *others]}
            first.same_as = list(distinct.values()) if len(distinct) > 1 else []
            first.settings = {key: _join_values([point.settings[key] for point in [first, *others]])
                              for key in first.settings}
    return [members[0] for members in alike.values()]


def _join_values(values: list[Any]) -> Any:
    """Join values: the value where all are equal, else a text such as kda|gdn."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else "|".join(str(value) for value in distinct)


def _describe_data(points: list[Point]) -> str:
    """Describe whether all points of a seed read the same tokens in the same order."""
    orders = set()
    for point in points:
        config = point.config
        data = {key: value for key, value in to_dict(config.data).items() if key != "cache_dir"}
        windows = [(stage.sequence_length, stage.batch_size) for stage in plan_stages(config)]
        orders.add(json.dumps([data, windows, config.model.mtp.depth], sort_keys=True))
    if len(orders) > 1:
        return ("the points do not read the same data in the same order: their data, sequence lengths, batch sizes or "
                "prediction depths differ")
    of_seed = " of a seed" if any(SEED_KEY in point.settings for point in points) else ""
    return f"data order: the same in all points{of_seed}"
