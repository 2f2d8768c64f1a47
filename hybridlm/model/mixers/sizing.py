"""Sizes that a mixer takes from the model around it: how a preset without heads and dims fits into any model.

A preset of `configs/mixer` says what a mixer computes and leaves its sizes open. `fill_sizes` of its config class puts
in what is missing, from a `ModelSizes`: the width of the model and the mixers that have their sizes already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from math import gcd
from typing import Any

from hybridlm.errors import require

COMMON_HEAD_DIMS = (128, 64, 32, 16, 8)
MIN_HEADS = 4  # a head dim is taken from the list above only where it leaves so many heads


@dataclass(frozen=True)
class HeadSizes:
    """Heads of a mixer as other kinds of mixers understand them.

    Args:
        num_heads: query heads.
        head_dim: dims of one head.
        num_kv_heads: key/value heads where groups of query heads share them, else None.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None


@dataclass(frozen=True)
class ModelSizes:
    """Everything about a model that sizes of a new mixer may follow.

    Args:
        hidden_size: width of the residual stream.
        max_position: tokens that the model is meant for.
        mixers: configs of the model's mixers that have all their sizes, the most telling first.
    """

    hidden_size: int
    max_position: int = 4096
    mixers: Sequence[Any] = ()  # of MixerConfig

    def nearest_mixer(self, config_class: type) -> Any | None:
        """The mixer whose sizes fit `config_class` best: one of that class, else one as linear as it, else the first.

        Returns:
            A MixerConfig that states its heads, or None where the model has none.
        """
        telling = [mixer for mixer in self.mixers if mixer.head_sizes() is not None]
        same_class = [mixer for mixer in telling if type(mixer) is config_class]
        as_linear = [mixer for mixer in telling if mixer.is_linear == config_class.is_linear]  # type: ignore[attr-defined]
        return next(iter([*same_class, *as_linear, *telling]), None)

    def heads_for(self, config_class: type) -> HeadSizes:
        """Heads of the nearest mixer, or heads that fill the model's width where no mixer states any.

        >>> ModelSizes(hidden_size=64).heads_for(int)
        HeadSizes(num_heads=4, head_dim=16, num_kv_heads=None)
        """
        mixer = self.nearest_mixer(config_class)
        if mixer is not None:
            return mixer.head_sizes()
        for head_dim in COMMON_HEAD_DIMS:
            if self.hidden_size % head_dim == 0 and self.hidden_size // head_dim >= MIN_HEADS:
                return HeadSizes(self.hidden_size // head_dim, head_dim)
        return HeadSizes(1, self.hidden_size)


def size_of(options: Mapping[str, Any], key: str, otherwise: int, least: int = 1) -> int:
    """The size that an option gives, for computing others from it; a wrong one is refused when the options are read.

    Args:
        options: plain data of a config, not checked yet.
        key: the option.
        otherwise: the size where the option is absent, null or no whole number of at least `least`.
        least: smallest size that can be computed with.

    >>> size_of({"block": 8}, "block", 64), size_of({"block": "x"}, "block", 64), size_of({"block": 0}, "block", 64)
    (8, 64, 64)
    """
    value = options.get(key)
    return value if type(value) is int and value >= least else otherwise


def missing_fields(config_class: type, options: Mapping[str, Any]) -> list[str]:
    """Fields of a config dataclass that have no default and no value in `options`; null counts as no value."""
    return [field.name for field in fields(config_class)
            if field.default is MISSING and field.default_factory is MISSING and options.get(field.name) is None]


def fill_missing(options: Mapping[str, Any], sizes: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    """`options` with those of `sizes` that they do not mention; a null stays, but for the `required` ones.

    >>> fill_missing({"gate_rank": None, "num_heads": None}, {"gate_rank": 8, "num_heads": 4}, ["num_heads"])
    {'gate_rank': None, 'num_heads': 4}
    """
    filled = dict(options)
    for key, value in sizes.items():
        open_option = key not in filled or (filled[key] is None and key in required)
        if open_option and value is not None:
            filled[key] = value
    return filled


def scale_heads(config: Any, factor: Fraction) -> dict[str, Any]:
    """Numbers of heads, and an inner width, for a model whose hidden size is `factor` times as large.

    Dims per head stay, so query and value heads grow in proportion. Key/value heads and groups grow as far as they
    still divide the query heads.

    Args:
        config: of a mixer; options named `num_heads`, `num_value_heads`, `num_kv_heads`, `num_groups`, `width` count.
        factor: hidden size of the new model over that of the old.

    Returns:
        The options that the config has, with their new values.

    Raises:
        ConfigError: a number of heads or a width that would not be whole.
    """
    found: dict[str, int] = {}
    for key in ("num_heads", "num_value_heads", "width"):
        old = getattr(config, key, None)
        if old is not None:
            new = old * factor
            require(new.denominator == 1, key, f"{key} of a mixer '{config.kind}' would not be whole", got=float(new),
                    expected=f"a hidden size at which {key}={old} times {factor} is whole")
            found[key] = int(new)
    for key in ("num_kv_heads", "num_groups"):
        old = getattr(config, key, None)
        if old is not None and "num_heads" in found:
            found[key] = _largest_divisor(found["num_heads"], max(1, int(old * factor)))
    return found


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`.

    >>> _largest_divisor(12, 5)
    4
    """
    return next(divisor for divisor in range(most, 0, -1) if gcd(number, divisor) == divisor)
