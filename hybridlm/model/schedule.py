"""Attention schedule: from the short forms a person writes to one mixer name a layer."""

from __future__ import annotations

import math
from itertools import cycle, islice

from hybridlm.errors import ConfigError
from hybridlm.model.config import ScheduleConfig


def expand(schedule: ScheduleConfig, num_layers: int) -> list[str]:
    """The mixer name of every layer.

    Raises:
        ConfigError: an override outside the model's layers.
    """
    if schedule.pattern is not None:
        period = schedule.pattern
    elif schedule.ratio == 0:
        period = [schedule.full]  # type: ignore[list-item]
    elif math.isinf(schedule.ratio):  # type: ignore[arg-type]
        period = [schedule.linear]  # type: ignore[list-item]
    else:
        period = [schedule.linear] * int(schedule.ratio) + [schedule.full]  # type: ignore
    layers = list(islice(cycle(period), num_layers))
    for index, name in schedule.override.items():
        if not -num_layers <= index < num_layers:
            raise ConfigError("schedule.override", "names a layer the model does not have", got=index,
                              expected=f"a layer between {-num_layers} and {num_layers - 1}")
        layers[index] = name
    return layers
