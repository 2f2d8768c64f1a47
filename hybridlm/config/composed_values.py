"""Values of a composed config: setting, deleting and resolving them, with one clear line where that cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridlm.config.schema import Config
from hybridlm.config.serialization import hint_at
from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.kind_registry import registry_of


def apply_override(config: DictConfig, override: Override) -> None:
    """Set or delete one value. A mapping is merged into the old one, unless it names a `kind`."""
    key, value = override.key_or_group, override.value()
    try:
        if override.is_delete():
            _delete(config, key)
        else:
            replace = isinstance(value, dict) and "kind" in value
            OmegaConf.update(config, key, value, merge=not replace, force_add=True)
    except IndexError:
        raise _beyond_list(config, key) from None
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(key, f"cannot be set: {one_line(error)}") from None


def _beyond_list(config: DictConfig, key: str) -> ConfigError:
    """The error for a key that names an entry which a list of the config does not have."""
    names = key.split(".")
    for depth in range(1, len(names)):
        entries = OmegaConf.select(config, ".".join(names[:depth]))
        if isinstance(entries, ListConfig) and names[depth].lstrip("-").isdigit() and int(names[depth]) >= len(entries):
            path = ".".join(names[:depth])
            return ConfigError(key, f"names an entry that {path} does not have", got=int(names[depth]),
                               expected=f"0 to {len(entries) - 1}" if entries else f"none, {path} is empty")
    return ConfigError(key, "names an entry that a list of the config does not have")


def change_kinds(config: DictConfig, values: list[Override]) -> None:
    """Delete the options of the old kind alone where an override changes the kind of a section such as `optimizer`."""
    for override in values:
        section, _, key = override.key_or_group.rpartition(".")
        registry = registry_of(hint_at(Config, section)) if section and "." not in section else None
        node = OmegaConf.select(config, section) if registry is not None else None
        if registry is None or key != registry.key or override.is_delete() or not isinstance(node, DictConfig):
            continue
        old, new = node.get(key, registry.default), override.value()
        if isinstance(new, str) and old in registry and new in registry and old != new:
            kept = {field.name for field in dataclasses.fields(registry.config_class(new))}
            for name in {field.name for field in dataclasses.fields(registry.config_class(old))} - kept:
                node.pop(name, None)


def use_one_schedule_form(config: DictConfig, values: list[Override]) -> None:
    """Delete the form of the schedule (pattern, or linear, full and ratio) that the overrides replace by the other."""
    path = "model.schedule"
    named = {override.key_or_group.removeprefix(f"{path}.") for override in values}
    forms = [{"pattern"}, {"linear", "full", "ratio"}]
    schedule = OmegaConf.select(config, path)
    for form, other in (forms, forms[::-1]):
        if isinstance(schedule, DictConfig) and named & form and not named & other:
            for key in other & set(schedule):
                del schedule[key]


def _delete(config: DictConfig, key: str) -> None:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig) or last not in node:
        known = list(node) if isinstance(node, DictConfig) else []
        raise ConfigError(key, "cannot be deleted: there is no such key", hint=did_you_mean(last, known))
    del node[last]


def plain_data(config: DictConfig) -> dict:
    """Plain data with every interpolation replaced by its value."""
    try:
        data = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error.full_key or ""), one_line(error)) from None
    assert isinstance(data, dict)
    return data


def one_line(error: Exception) -> str:
    """The first two lines of an error of Hydra, as one; the others are advice about Hydra itself."""
    lines = [line.strip() for line in str(error).splitlines()]
    useful = [line for line in lines if line and not line.startswith(("full_key:", "object_type=", "To append"))]
    return " ".join(useful[:2])


def merge_options(base: DictConfig, own: Mapping[str, Any]) -> DictConfig:
    """`base` with the keys and values of `own` on top; mappings are merged.

    Raises:
        ConfigError: a key has a mapping on one side and a list on the other.
    """
    merged = base
    for key, value in own.items():
        try:
            merged = OmegaConf.merge(merged, {key: value})  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            raise ConfigError(str(key), f"cannot be set: {one_line(error)}", got=value) from None
    return merged
