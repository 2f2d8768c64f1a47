"""One point of a sweep: its config, its values of the varied settings, and its identity."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from hybridlm.config.schema import Config
from hybridlm.config.serialization import to_dict
from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.model.cost import mtp_block
from hybridlm.sweep.probe_tasks import PointWork
from hybridlm.training.stages import Stage, plan_stages

SEED_KEY = "training.seed"


@dataclass(kw_only=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: name of its folder.
        settings: value of each varied key. Where several combinations give the same run, their values are joined
            ("kda|gdn"), and `same_as` lists the combinations.
        config: the config of the run.
        changed: {key: [before, after]} of the options that matching the budget has changed.
        work: trainings besides text.
    """

    name: str
    settings: dict[str, Any]
    config: Config
    same_as: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, list[Any]] = field(default_factory=dict)
    work: PointWork = field(default_factory=PointWork)

    @property
    def group(self) -> dict[str, Any]:
        """The settings without the seed: results are averaged over the points of one group."""
        return {key: value for key, value in self.settings.items() if key != SEED_KEY}

    @property
    def stages(self) -> list[Stage]:
        """The stages of its training on text; none where it is trained on probes alone."""
        return plan_stages(self.config) if self.work.language_model else []

    @property
    def steps(self) -> int:
        """Optimizer steps on text."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of training, on text and on probes."""
        text = sum(stage.steps * stage.tokens_per_step for stage in self.stages)
        return text + sum(task.tokens for task in self.work.probes)


def find_point(points: list[Point], name: str, key: str) -> Point:
    """Find a point by its name.

    Args:
        points: the points of a sweep.
        name: the name, as the user gives it.
        key: the setting that gives it, for the error.

    Raises:
        ConfigError: there is no such point.
    """
    for point in points:
        if point.name == name:
            return point
    names = [point.name for point in points]
    hint = did_you_mean(name, names)
    raise ConfigError(key, "is no point of this sweep", got=name, expected="" if hint else f"such as {names[0]}",
                      hint=hint)


def identify_run(config: Config) -> str:
    """Make a text that is equal for configs of the same training.

    The layer list and the branches of each layer count, not how the schedule was written; neither do mixers that no
    layer uses, nor names.
    """
    data = to_dict(config)
    model = config.model
    layers = model.layers()
    used = set(layers)
    if model.mtp.depth:
        used.add(mtp_block(model)[1])
    data["model"] |= {"schedule": [(name, model.present_branches(name)) for name in layers], "name": "",
                      "mixers": {name: data["model"]["mixers"][name] for name in sorted(used)}}
    data["run_dir"] = ""
    data["tracking"]["run_name"] = ""
    return json.dumps(data, sort_keys=True, default=str)


def shorten_keys(keys: list[str]) -> dict[str, str]:
    """Shorten dotted keys to their endings, as short as keeps them different.

    >>> shorten_keys(["model.schedule.ratio", "optimizer.lr", "schedule.lr"])
    {'model.schedule.ratio': 'ratio', 'optimizer.lr': 'optimizer.lr', 'schedule.lr': 'schedule.lr'}
    """
    parts = {key: re.split(r"[./@]", key) for key in keys}
    short = {}
    for key in keys:
        for count in range(1, len(parts[key]) + 1):
            ending = parts[key][-count:]
            if sum(other[-count:] == ending for other in parts.values()) == 1:
                break
        short[key] = ".".join(ending)
    return short
