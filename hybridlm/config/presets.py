"""Mixers by the name of a preset: a schedule may name any file of `configs/mixer`, whether its model defines it or not.

`model.schedule.linear=gdn` on a model that has only `kda` and `full` adds the mixer `gdn` from configs/mixer/gdn.yaml,
or from the same file in a user's own folder. What the preset leaves open follows the model: heads and dims, and how
the branch joins the residual, are those of the mixer that is most like it. The result is written out in the run's
config like any other mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.kind_registry import registry_of
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.schedule import expand

PRESET_GROUP = "mixer"  # the config group whose options a schedule may name


def add_named_presets(model: Any, presets: list[str], read_preset: Callable[[str, Mapping[str, Any]], dict]) -> Any:
    """A model's config with the presets that its schedule names and its `mixers` do not define.

    An entry of `mixers` without a `kind` does not define a mixer: its options go on top of the preset's.

    Args:
        model: plain data of the model's config.
        presets: names of all presets.
        read_preset: gives the options of a preset, with the given options on top.

    Returns:
        The model with the presets added, or `model` itself where none is needed or the model cannot be read (then the
        check of the whole config says what is wrong).

    Raises:
        ConfigError: the schedule names a mixer that the model does not define and that is no preset.
    """
    if not isinstance(model, dict) or not isinstance(model.get("mixers"), dict):
        return model
    mixers = model["mixers"]
    defined = {name: options for name, options in mixers.items() if isinstance(options, dict) and "kind" in options}
    needed = _named_mixers(model)
    added = {}
    for name, (key, place) in needed.items():
        if name in presets and name not in defined:
            added[name] = _fit(read_preset(name, mixers.get(name) or {}), model, [*needed, *defined], defined)
        elif name not in mixers:
            raise ConfigError(key, f"{place}names an unknown mixer", got=name,
                              expected=f"one of {', '.join(sorted(defined))} of the model, or a preset: "
                                       + ", ".join(presets),
                              hint=did_you_mean(name, [*defined, *presets]))
    return {**model, "mixers": {**mixers, **added}} if added else model


def _named_mixers(model: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The mixers that the schedule and multi-token prediction name: name -> (key, words for where it stands)."""
    try:
        layers = expand(from_dict(ScheduleConfig, model.get("schedule"), "model.schedule"), model["num_layers"])
    except (ConfigError, KeyError, TypeError):
        return {}  # the check of the whole config says what is wrong
    named: dict[str, tuple[str, str]] = {}
    for index, name in enumerate(layers):
        named.setdefault(name, ("model.schedule", f"layer {index} "))
    mtp = model.get("mtp")
    if isinstance(mtp, dict) and isinstance(mtp.get("mixer"), str):
        named.setdefault(mtp["mixer"], ("model.mtp.mixer", ""))
    return named


def _fit(options: dict[str, Any], model: dict[str, Any], order: list[str], defined: dict[str, Any]) -> dict[str, Any]:
    """The preset with what it leaves open taken from the model's mixers.

    Args:
        options: of the preset, with a person's own on top.
        model: plain data of the model's config.
        order: names of the mixers to follow, those of the schedule first.
        defined: options of the mixers that the model defines, by name.
    """
    registry = registry_of(MixerConfig)
    kind, width = options.get("kind"), model.get("hidden_size")
    if registry is None or kind not in registry or not isinstance(width, int):
        return options
    followed = []
    for name in dict.fromkeys(order):
        try:
            followed.append(from_dict(MixerConfig, defined.get(name)))
        except ConfigError:
            continue  # not defined, or wrong: the check of the whole config says so
    sizes = ModelSizes(hidden_size=width, max_position=model.get("max_position", ModelSizes.max_position),
                       mixers=followed)
    config_class: Any = registry.config_class(kind)
    fitted = config_class.fill_sizes(options, sizes)
    nearest = sizes.nearest_mixer(config_class)
    if "residual" not in options and nearest is not None:
        fitted["residual"] = to_dict(nearest.residual)
    return fitted
