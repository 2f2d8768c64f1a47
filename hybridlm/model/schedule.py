"""Schedule: from the short forms that a person writes to one mixer name per layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import cycle, islice

from hybridlm.errors import ConfigError, require


@dataclass(kw_only=True)
class ScheduleConfig:
    """The mixer of every layer, in a short form that `expand` turns into one name per layer.

    Either `pattern`, tiled over depth, or `ratio` layers of `linear`, then one of `full`, repeated; ratio 0 is all
    full, inf all linear. Either with `override` ({layer: name}; negative layers count from the end).

    Layers of the mixers in `alone` have no feed-forward; those of a mixer of kind `none` have nothing else.
    """

    pattern: list[str] | None = None
    override: dict[int, str] = field(default_factory=dict)
    linear: str | None = None
    full: str | None = None
    ratio: float | None = None
    alone: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        short = [k for k in ("linear", "full", "ratio") if getattr(self, k) is not None]
        if self.pattern is not None:
            require(not short, short[0] if short else "", "cannot stand beside 'pattern'", got=self.pattern,
                    expected="either 'pattern' or the short form (linear, full, ratio)",
                    hint="set pattern=null to use the short form")
            require(len(self.pattern) > 0, "pattern", "names no mixer", got=self.pattern,
                    expected="a list of mixer names such as [kda, kda, kda, full]")
        else:
            require(self.ratio is not None, "ratio", "is missing", expected="'pattern', or linear, full and ratio")
            assert self.ratio is not None
            require(self.ratio >= 0 and (math.isinf(self.ratio) or self.ratio == int(self.ratio)), "ratio",
                    "must be a whole number of linear layers for each full one", got=self.ratio,
                    expected="0, 1, 2, ... or inf")
            require(self.ratio == 0 or self.linear is not None, "linear", "is missing", expected="a mixer name")
            require(math.isinf(self.ratio) or self.full is not None, "full", "is missing", expected="a mixer name")


def expand(schedule: ScheduleConfig, num_layers: int) -> list[str]:
    """The mixer name of every layer.

    Raises:
        ConfigError: an override outside the model's layers.

    Example:
        >>> expand(ScheduleConfig(linear="kda", full="mla", ratio=2, override={0: "mla"}), 5)
        ['mla', 'kda', 'mla', 'kda', 'kda']
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
