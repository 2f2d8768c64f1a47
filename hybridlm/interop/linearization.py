"""Plans a conversion of attention: the layers that stay, those that get another mixer, and the config of the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlm.config.schema import ConvertConfig
from hybridlm.errors import ConfigError
from hybridlm.interop.surgery import convert_attention
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import build_model

SELECTION_KEY = "keep"  # of a file that `hybridlm select` writes


@dataclass(frozen=True)
class Conversion:
    """A planned conversion.

    Args:
        model: config of the converted model.
        keep: attention layers that stay.
        converted: layers that get the new mixer.
    """

    model: ModelConfig
    keep: list[int]
    converted: list[int]


def plan_conversion(convert: ConvertConfig, config: ModelConfig, source: str = "teacher",
                    context_length: int | None = None) -> Conversion:
    """Choose the layers of a model to convert, and make the config of the result; nothing is allocated.

    Args:
        convert: the new mixer, and what stays.
        config: the model.
        source: the key that names its checkpoint, for messages.
        context_length: longest sequence of the run, which open sizes of the mixer follow; None is that of the model.

    Raises:
        ConfigError: the model has no attention to convert, none would be converted, or the mixer cannot start from
            it.

    Example:
        >>> from hybridlm import load_config
        >>> teacher = load_config("train", ["model=hybrid_tiny", "model.schedule.ratio=0"]).model
        >>> plan = plan_conversion(ConvertConfig(mixer="gla", keep=[1]), teacher)
        >>> plan.model.layers(), plan.converted
        (['gla', 'full', 'gla', 'gla'], [0, 2, 3])
    """
    attention = attention_layers(config, source)
    keep = _layers_to_keep(convert.keep, attention, config.num_layers)
    converted = [layer for layer in attention if layer not in keep]
    if not converted:
        raise ConfigError("recipe.convert.keep", "keeps all of the attention: there is nothing to convert",
                          got=convert.keep, expected=f"fewer of the {len(attention)} attention layers")
    try:
        model, _ = convert_attention(build_model(config, device="meta"), converted, convert.mixer,
                                     context_length=context_length, calibrated=convert.init == "calibrated")
    except ConfigError as error:
        raise ConfigError(f"recipe.convert.{error.key}", error.what, got=error.got, expected=error.expected,
                          hint=error.hint) from None
    label = convert.mixer if isinstance(convert.mixer, str) else convert.mixer.get("kind")
    model.config.name = f"{config.name or 'model'}_{label}"
    return Conversion(model.config, keep, converted)


def attention_layers(config: ModelConfig, source: str = "teacher") -> list[int]:
    """List the layers of softmax attention over all tokens.

    Args:
        config: the model.
        source: the key that names its checkpoint, for messages.

    Raises:
        ConfigError: there is none.
    """
    names = config.layers()
    found = [i for i, name in enumerate(names)
             if config.mixers[name].can_take_indexer() or config.mixers[name].has_indexer()]
    if not found:
        kinds = sorted({f"{name} ({config.mixers[name].kind})" for name in names})
        selects = any(config.mixers[name].has_selector() for name in names)
        raise ConfigError(source, "holds a model without full attention: there is nothing to convert",
                          got=", ".join(kinds), expected="layers of kind attention without a window",
                          hint="recipe.convert=null trains the selectors that are there further" if selects else "")
    return found


def spread_evenly(layers: Sequence[int], count: int) -> list[int]:
    """Choose `count` of the layers, evenly spread, the last among them.

    >>> spread_evenly(range(28), 7), spread_evenly(range(4), 0)
    ([3, 7, 11, 15, 19, 23, 27], [])
    """
    return [layers[(index + 1) * len(layers) // count - 1] for index in range(count)]


def default_keep(attention: Sequence[int]) -> int:
    """The number of attention layers that stay where nothing else is said: a quarter, none of one layer."""
    return max(1, round(len(attention) / 4)) if len(attention) > 1 else 0


def _layers_to_keep(keep: int | Sequence[int] | str | None, attention: Sequence[int], num_layers: int) -> list[int]:
    if isinstance(keep, str):
        keep = read_selection(keep)
    if keep is None:
        keep = default_keep(attention)
    if isinstance(keep, int):
        if not 0 <= keep <= len(attention):
            raise ConfigError("recipe.convert.keep", "is not a number of attention layers of the teacher", got=keep,
                              expected=f"0 to {len(attention)}")
        return spread_evenly(attention, keep)
    for layer in keep:
        if not -num_layers <= layer < num_layers or layer % num_layers not in attention:
            raise ConfigError("recipe.convert.keep", "names a layer that is not full attention of the teacher",
                              got=layer, expected=f"some of {list(attention)}")
    return sorted({layer % num_layers for layer in keep})


def read_selection(path: str) -> list[int]:
    """Read the layers that stay from a file of `hybridlm select`.

    Raises:
        ConfigError: there is no such file, or it is another.
    """
    file = Path(path).expanduser()
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        layers = data[SELECTION_KEY]
    except OSError as error:
        raise ConfigError("recipe.convert.keep", f"cannot be read ({error.strerror})", got=path,
                          expected="a number, a list of layers, or a file of hybridlm select") from None
    except (ValueError, KeyError, TypeError):
        layers = None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ConfigError("recipe.convert.keep", "is not a file of hybridlm select", got=path,
                          expected=f"JSON with a list of layers under '{SELECTION_KEY}'")
    return layers
