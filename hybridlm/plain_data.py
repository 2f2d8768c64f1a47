"""Configs as plain data: numbers, texts, lists and mappings, ready to be compared, saved or printed."""

from __future__ import annotations

import dataclasses
from typing import Any


def to_dict(config: Any) -> Any:
    """Plain data from a config: the inverse of `from_dict`, with every default written out.

    >>> from hybridlm.model.layer_context import NormConfig
    >>> to_dict({"norm": NormConfig(), "sizes": (1, 2)})
    {'norm': {'eps': 1e-06, 'zero_centered': False}, 'sizes': [1, 2]}
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config
