"""Configs of earlier versions: what they called by other names, and where these names are refused or read.

A checkpoint or run folder keeps the names of the version that wrote it. Whoever reads its config passes it through
`upgrade_config` (`load_saved_config` does both), so that old runs load, resume and report as ever. On the command line,
in a sweep and in a person's own YAML file an old name is refused with the new one (`refuse_renamed`), so that what
people write stays in one language.

Whoever renames a key adds it to `RENAMED_KEYS`, a kind or another value to `RENAMED_VALUES`. An option that moves into
the config of one kind needs an entry in `EARLIER_FIELDS`, if earlier versions wrote it for every kind.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridlm.config.schema import Config
from hybridlm.config.serialization import hint_at, load_yaml
from hybridlm.errors import ConfigError
from hybridlm.kind_registry import registry_of

# Old dotted path of a key -> its path now, of a whole run's config. `*` stands for any one name or index; the new path
# has it in the same place. A key of a model is written with `model.` before it.
RENAMED_KEYS: dict[str, str] = {
    "engine.sequence_parallel": "engine.context_parallel",
    "kernels.decay_attention": "kernels.linear_attention",
}

# Dotted path of a value -> {what it was called: what it is called now}.
RENAMED_VALUES: dict[str, dict[str, str]] = {
    "model.mixers.*.kind": {"decay": "linear_attention"},
}

# Sections that earlier versions wrote with the options of all kinds. Those that the section's kind lacks are left out.
EARLIER_FIELDS: dict[str, tuple[str, ...]] = {
    "optimizer": ("lr", "betas", "eps", "weight_decay", "muon_lr", "muon_momentum", "schedule"),
    "engine": ("num_processes", "timeout", "device", "offload_optimizer", "offload_parameters", "overlap",
               "bucket_elements", "persistence_threshold", "communication_dtype", "expert_parallel",
               "context_parallel"),
}

# Every saved config has these keys; a person's own file has no reason to write them all.
_SAVED_RUN = {"model", "data", "optimizer", "recipe", "training", "engine", "tracking", "kernels", "run_dir",
              "init_from"}
_SAVED_MODEL = {"vocab_size", "hidden_size", "num_layers", "schedule", "mixers", "feed_forward", "norm", "mtp",
                "max_position", "tie_embeddings", "init_std", "z_loss", "logit_soft_cap", "name", "published"}


def load_saved_config(path: str | Path) -> Any:
    """Plain data of a config.yaml in a checkpoint, run or sweep folder, in the names of this version.

    Raises:
        ConfigError: the file is missing, or is not YAML.
    """
    return upgrade_config(load_yaml(path))


def is_saved_config(data: Any) -> bool:
    """Whether a run or an import has written `data`, with every value, rather than a person."""
    if not isinstance(data, dict) or "defaults" in data:
        return False
    model = data.get("model")
    if set(data) == {"model"} and isinstance(model, dict):
        return set(model) >= _SAVED_MODEL
    return set(data) >= _SAVED_RUN


def upgrade_config(data: Any) -> Any:
    """A saved config in the names of this version; one that has them already comes back equal.

    Args:
        data: plain data of a whole run's config, or of `{"model": ...}` alone. It is not changed.

    Example:
        >>> upgrade_config({"model": {"mixers": {"lightning": {"kind": "decay", "num_heads": 2}}}})
        {'model': {'mixers': {'lightning': {'kind': 'linear_attention', 'num_heads': 2}}}}
    """
    data = copy.deepcopy(data)
    for old, new in RENAMED_KEYS.items():
        for path in list(_matches(data, old)):
            parent, key = _parent(data, path)
            value = parent.pop(key)
            _set(data, _filled(new, path, old), value)
    for pattern, names in RENAMED_VALUES.items():
        for path in _matches(data, pattern):
            parent, key = _parent(data, path)
            if isinstance(parent[key], str):
                parent[key] = names.get(parent[key], parent[key])
    for path in _matches(data, "recipe.stages.*.trainable.*"):
        parent, key = _parent(data, path)
        if isinstance(parent[key], str):
            parent[key] = upgrade_pattern(parent[key])
    for section, fields in EARLIER_FIELDS.items():
        _leave_out_other_kinds(data, section, fields)
    return data


def upgrade_layers(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A checkpoint's explicit layer list (layers.json) in the names of this version.

    Example:
        >>> upgrade_layers([{"layer": 0, "mixer": "lightning", "kind": "decay"}])
        [{'layer': 0, 'mixer': 'lightning', 'kind': 'linear_attention'}]
    """
    kinds = RENAMED_VALUES["model.mixers.*.kind"]
    return [{**layer, "kind": kinds.get(layer["kind"], layer["kind"])} if "kind" in layer else layer
            for layer in layers]


def upgrade_pattern(pattern: str) -> str:
    """A shell pattern over parameter names, in the parameter names of this version.

    Example:
        >>> upgrade_pattern("layers.*.mixer.f.q_proj.weight"), upgrade_pattern("*.feed_forward.norm.*")
        ('layers.*.mixer.q_proj.weight', '*.feed_forward_norm.*')
    """
    return re.sub(r"(mixer|feed_forward)\.(f|norm)\.", lambda m: f"{m[1]}." if m[2] == "f" else f"{m[1]}_norm.",
                  pattern)


def refuse_renamed(data: Any) -> None:
    """Refuses a config in which a key or value has a name of an earlier version.

    Raises:
        ConfigError: the first such key or value, with its new name.
    """
    for old, new in RENAMED_KEYS.items():
        for path in _matches(data, old):
            raise ConfigError(".".join(path), "was renamed", expected=".".join(_filled(new, path, old)))
    for pattern, names in RENAMED_VALUES.items():
        for path in _matches(data, pattern):
            parent, key = _parent(data, path)
            if isinstance(parent[key], str) and parent[key] in names:
                raise ConfigError(".".join(path), "was renamed", got=parent[key], expected=names[parent[key]])


def _matches(data: Any, pattern: str) -> Iterator[list[str]]:
    """The paths in `data` that `pattern` names, each as a list of keys."""
    first, _, rest = pattern.partition(".")
    if isinstance(data, list):
        keys: list[Any] = list(range(len(data))) if first == "*" else []
    elif isinstance(data, dict):
        keys = list(data) if first == "*" else [first] * (first in data)
    else:
        return
    for key in keys:
        if not rest:
            yield [str(key)]
            continue
        for inner in _matches(data[key], rest):
            yield [str(key), *inner]


def _parent(data: Any, path: list[str]) -> tuple[Any, Any]:
    """The mapping or list that holds the value at `path`, and the key or index in it."""
    for key in path[:-1]:
        data = data[int(key) if isinstance(data, list) else key]
    return data, int(path[-1]) if isinstance(data, list) else path[-1]


def _set(data: dict, path: list[str], value: Any) -> None:
    """Sets the value at `path`, unless one is there already; mappings on the way are made."""
    node: Any = data
    for key in path[:-1]:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    node.setdefault(path[-1], value)


def _filled(new: str, path: list[str], old: str) -> list[str]:
    """The new path with what stood in the place of each `*` of the old one."""
    found = [key for key, part in zip(path, old.split("."), strict=True) if part == "*"]
    return [found.pop(0) if part == "*" else part for part in new.split(".")]


def _leave_out_other_kinds(data: Any, section: str, fields: tuple[str, ...]) -> None:
    """Leaves out those `fields` of a section that its kind does not have, where a registered kind is named."""
    options = data.get(section) if isinstance(data, dict) else None
    registry = registry_of(hint_at(Config, section))
    if registry is None or not isinstance(options, dict) or options.get(registry.key) not in registry:
        return
    known = {field.name for field in dataclasses.fields(registry.config_class(options[registry.key]))}
    for key in set(fields) - known:
        options.pop(key, None)
