"""Heads of gated blocks that are wider than the model, in presets without sizes (Mamba-2, Mamba-3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridlm.model.mixers.sizing import ModelSizes, size_of

EXPAND = 2  # inner channels per dim of the model
HEAD_DIM = 64  # where it divides the inner channels


def expanded_heads(options: Mapping[str, Any], model: ModelSizes, config_class: type) -> dict[str, Any]:
    """Heads of twice the width of the model: of 64 dims where that divides it, else of the dims of the model's heads.

    >>> expanded_heads({}, ModelSizes(hidden_size=256), int)
    {'num_heads': 8, 'head_dim': 64}
    """
    inner = EXPAND * model.hidden_size
    asked = size_of(options, "head_dim", 0)
    candidates = [asked] if asked else [HEAD_DIM, model.heads_for(config_class).head_dim, model.hidden_size]
    groups = size_of(options, "num_groups", 1)
    head_dim = next((dim for dim in candidates if inner % (dim * groups) == 0), candidates[-1])
    return {"num_heads": size_of(options, "num_heads", max(inner // head_dim, groups)), "head_dim": head_dim}
