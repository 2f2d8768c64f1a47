"""Mixers by the name of a preset: a schedule may name any file of `configs/mixer`, whether its model defines it or not.

`model.schedule.linear=gdn` on a model that has only `kda` and `full` adds the mixer `gdn` from configs/mixer/gdn.yaml,
or from the same file in a user's own folder. What the preset leaves open follows the model: heads and dims, and how
the branch joins the residual, are those of the mixer that is most like it. The result is written out in the run's
config like any other mixer. A name that is no preset may be a registered kind, such as one of the user's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from hybridlm.config.serialization import from_dict, hint_at, to_dict
from hybridlm.errors import ConfigError, did_you_mean_or_own
from hybridlm.kind_registry import registry_of
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.schedule import expand

PRESET_GROUP = "mixer"  # the config group whose options a schedule may name


@dataclass(kw_only=True)
class _ModelOutline:
    """The part of a model's config by which presets are chosen and sized."""

    hidden_size: int
    num_layers: int
    schedule: ScheduleConfig
    max_position: int = ModelSizes.max_position


def add_named_presets(model: Any, presets: list[str], read_preset: Callable[[str, Mapping[str, Any]], dict]) -> Any:
    """A model's config with the presets, or registered kinds, that its schedule names and its `mixers` do not define.

    An entry of `mixers` without a `kind` does not define a mixer: its options go on top of the preset's.

    Args:
        model: plain data of the model's config.
        presets: names of all presets.
        read_preset: gives the options of a preset, with the given options on top.

    Returns:
        The model with the presets added, or `model` itself where none is needed.

    Raises:
        ConfigError: the schedule names a mixer that the model does not define and that is no preset, or the model's
            sizes or schedule cannot be read.
    """
    mixers = model.get("mixers") if isinstance(model, dict) else None
    if not isinstance(mixers, dict):
        return model  # the check of the whole config says what is wrong
    if not {"hidden_size", "num_layers", "schedule"} <= model.keys():
        return model  # the same: one may be misspelt
    keys = [field.name for field in dataclasses.fields(_ModelOutline)]
    outline = from_dict(_ModelOutline, {key: model[key] for key in keys if key in model}, "model")
    needed = _named_mixers(outline, model.get("mtp"))
    defined = {name: options for name, options in mixers.items() if isinstance(options, dict) and "kind" in options}
    kinds: set[str] = set(registry_of(MixerConfig) or {})
    added = {}
    for name, (key, place) in needed.items():
        own = mixers.get(name, {})
        if name in defined or not isinstance(own, dict | None):
            continue
        if name in presets or name in kinds:
            options = read_preset(name, own or {}) if name in presets else {"kind": name, **(own or {})}
            _refuse_idle(options, f"model.mixers.{name}")
            added[name] = _fit(options, outline, [*needed, *defined], defined)
        elif name not in mixers:
            known = f"one of {', '.join(sorted(defined))} of the model, or " if defined else ""
            raise ConfigError(key, f"{place}names an unknown mixer", got=name,
                              expected=f"{known}a preset: {', '.join(presets)}",
                              hint=did_you_mean_or_own(name, [*defined, *presets, *sorted(kinds)]))
    return {**model, "mixers": {**mixers, **added}} if added else model


def refuse_idle_options(model: Any) -> None:
    """Refuse options of a model's mixers that have no effect because others share a value of an earlier layer.

    Args:
        model: plain data of the model's config, as a person gives it.

    Raises:
        ConfigError: the first such option.
    """
    mixers = model.get("mixers") if isinstance(model, dict) else None
    for name, options in mixers.items() if isinstance(mixers, dict) else ():
        _refuse_idle(options, f"model.mixers.{name}")


def _refuse_idle(options: Any, key: str) -> None:
    registry = registry_of(MixerConfig)
    if registry is None or not isinstance(options, dict) or options.get("kind") not in registry:
        return
    config_class: Any = registry.config_class(options["kind"])
    for path, cause in config_class.idle_options(options).items():
        value, default = _value_and_default(options, config_class, path)
        if value is not None and value != default:  # a preset may write a default out
            raise ConfigError(f"{key}.{path}", f"has no effect beside {cause}", got=value, expected="no value",
                              hint="it is that of the layer that is read")


def _value_and_default(options: dict[str, Any], config_class: Any, path: str) -> tuple[Any, Any]:
    """The value that is given at a dotted path, None without one, and the default there."""
    registry = registry_of(MixerConfig)
    section: Any = options
    *sections, last = path.split(".")
    for part in sections:
        section = section.get(part) if isinstance(section, dict) else None
        if registry is not None and isinstance(section, dict) and section.get("kind") in registry:
            config_class = registry.config_class(section["kind"])
        else:
            hint = hint_at(config_class, part)
            config_class = next((arg for arg in (hint, *get_args(hint)) if dataclasses.is_dataclass(arg)), hint)
    known = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
    default = next((option.default for option in known if option.name == last), dataclasses.MISSING)
    return (section.get(last) if isinstance(section, dict) else None), default


def _named_mixers(model: _ModelOutline, mtp: Any) -> dict[str, tuple[str, str]]:
    """The mixers that the schedule and multi-token prediction name: name -> (key, words for where it stands)."""
    try:
        layers = expand(model.schedule, model.num_layers)
    except ConfigError as error:
        raise error.within("model") from None
    named: dict[str, tuple[str, str]] = {}
    for index, name in enumerate(layers):
        named.setdefault(name, ("model.schedule", f"layer {index} "))
    if isinstance(mtp, dict) and isinstance(mtp.get("mixer"), str):
        named.setdefault(mtp["mixer"], ("model.mtp.mixer", ""))
    return named


def _fit(options: dict[str, Any], model: _ModelOutline, order: list[str], defined: dict[str, Any]) -> dict[str, Any]:
    """The preset with what it leaves open taken from the model's mixers.

    Args:
        options: of the preset, with a person's own on top.
        model: the model's sizes.
        order: names of the mixers to follow, those of the schedule first.
        defined: options of the mixers that the model defines, by name.
    """
    registry = registry_of(MixerConfig)
    if registry is None or options.get("kind") not in registry:
        return options  # the check of the whole config says what is wrong
    followed = []
    for name in dict.fromkeys(order):
        try:
            followed.append(from_dict(MixerConfig, defined.get(name)))  # type: ignore[type-abstract]
        except ConfigError:
            continue  # not defined, or wrong: the check of the whole config says so
    sizes = ModelSizes(hidden_size=model.hidden_size, max_position=model.max_position, mixers=followed)
    config_class: Any = registry.config_class(options["kind"])
    fitted = config_class.fill_sizes(options, sizes)
    nearest = sizes.nearest_mixer(config_class)
    if "residual" not in options and nearest is not None:
        fitted["residual"] = to_dict(nearest.residual)
    return fitted
