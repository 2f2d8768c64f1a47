"""Schedule: from the short forms that a person writes to one mixer name per layer, and the order in which layers run.

A layer that runs several times has its weights once. Each of its runs has a decode state, and may have adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import cycle, islice

from hybridlm.errors import ConfigError, require


@dataclass(kw_only=True)
class RepeatConfig:
    """A segment of layers that runs several times in a row (recurrent-depth and looped transformers).

    Args:
        first: first layer of the segment.
        last: its last layer.
        times: number of runs; 1 is a model without repetition.

    Raises:
        ConfigError: a segment without layers, or no run of it.
    """

    first: int
    last: int
    times: int

    def __post_init__(self) -> None:
        require(0 <= self.first <= self.last, "last", "must not be before 'first', which is 0 or more",
                got=[self.first, self.last], expected="layers such as first: 2, last: 5")
        require(self.times >= 1, "times", "must be positive", got=self.times)


@dataclass(kw_only=True)
class RunAdaptersConfig:
    """Weights of each single run of the layers that run several times, beside those that all runs share.

    Both lists hold names of linear maps in a layer, such as `mixer.q_proj`, or shell patterns over them.

    Args:
        low_rank: maps to which each run adds a product of two matrices, W x + B_k A_k x (LoRA), with B_k = 0 at first.
        rank: rows of A_k.
        separate: maps that each run has for itself.

    Raises:
        ConfigError: no maps, or a rank that is not positive.
    """

    low_rank: list[str] = field(default_factory=list)
    rank: int = 8
    separate: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.rank > 0, "rank", "must be positive", got=self.rank)
        require(bool(self.low_rank or self.separate), "low_rank", "names no linear map", got=self.low_rank,
                expected="names in a layer such as [mixer.q_proj], here or in 'separate'")


@dataclass(kw_only=True)
class ScheduleConfig:
    """The mixer of every layer, in a short form that `expand` turns into one name per layer.

    Either `pattern`, tiled over depth, or `ratio` layers of `linear`, then one of `full`, repeated; ratio 0 is all
    full, inf all linear. Either with `override` ({layer: name}; negative layers count from the end).

    Layers of the mixers in `alone` have no feed-forward; those of a mixer of kind `none` have nothing else.

    Layers run in their order, each once, unless `reuse` or `repeat` says otherwise. `reuse` ({layer: [later layers]})
    runs a layer again right before each of these; `repeat` runs a segment several times. `run_adapters` are weights
    that each run of such a layer has for itself.
    """

    pattern: list[str] | None = None
    override: dict[int, str] = field(default_factory=dict)
    linear: str | None = None
    full: str | None = None
    ratio: float | None = None
    alone: list[str] = field(default_factory=list)
    reuse: dict[int, list[int]] = field(default_factory=dict)
    repeat: RepeatConfig | None = None
    run_adapters: RunAdaptersConfig | None = None

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
        require(not self.reuse or self.repeat is None, "repeat", "cannot stand beside 'reuse'", got=self.reuse,
                expected="one of the two")
        for layer, later in self.reuse.items():
            require(bool(later) and all(other > layer >= 0 for other in later), f"reuse.{layer}",
                    "must be followed by later layers", got=later, expected=f"layers after {layer}, which is 0 or more")
            require(len(set(later)) == len(later), f"reuse.{layer}", "names a layer twice", got=later,
                    expected="each later layer once")
        require(self.run_adapters is None or bool(self.reuse) or self.repeat is not None, "run_adapters",
                "need layers that run several times", expected="'reuse' or 'repeat' beside them")


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


def expand_runs(schedule: ScheduleConfig, num_layers: int) -> list[int]:
    """The layer of every run, in the order of the forward.

    Raises:
        ConfigError: a layer that the model does not have.

    Example:
        >>> expand_runs(ScheduleConfig(pattern=["kda"], repeat=RepeatConfig(first=1, last=2, times=2)), 4)
        [0, 1, 2, 1, 2, 3]
        >>> expand_runs(ScheduleConfig(pattern=["kda"], reuse={1: [3]}), 4)
        [0, 1, 2, 1, 3]
    """
    if schedule.repeat is not None:
        first, last = schedule.repeat.first, schedule.repeat.last
        _require_layer("schedule.repeat.last", last, num_layers)
        segment = [*range(first, last + 1)]
        return [*range(first), *segment * schedule.repeat.times, *range(last + 1, num_layers)]
    runs: list[int] = []
    for index in range(num_layers):
        runs += [layer for layer, later in schedule.reuse.items() if index in later]
        runs.append(index)
    for layer, later in schedule.reuse.items():
        _require_layer(f"schedule.reuse.{layer}", max(later), num_layers)
    return runs


def _require_layer(key: str, index: int, num_layers: int) -> None:
    require(index < num_layers, key, "names a layer the model does not have", got=index,
            expected=f"a layer below {num_layers}")
