"""Projections of softmax attention as the start of a linear mixer that replaces it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybridlm.model.mixers.contract import MixerConfig


def take_attention_projections(old: MixerConfig, tensors: Mapping[str, Tensor],
                               wanted: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Take q, k, v and o projections of softmax attention, where heads and dims fit.

    Grouped keys and values are repeated for the heads that shared them.

    Args:
        old: config of the replaced mixer.
        tensors: its parameters, by name within the mixer.
        wanted: heads and dims per head of the new `q_proj`, `k_proj` and `v_proj`; `o_proj` takes what `v_proj` gives.

    Returns:
        Weights by parameter name; those that do not fit are missing.
    """
    available = old.projection_heads()
    found = {}
    for name, (heads, dim) in available.items():
        new_heads, new_dim = wanted.get(name, (0, 0))
        if dim == new_dim and new_heads % heads == 0:
            by_head = tensors[f"{name}.weight"].detach().unflatten(0, (heads, dim))
            found[f"{name}.weight"] = by_head.repeat_interleave(new_heads // heads, 0).flatten(0, 1)
    heads, dim = available.get("o_proj", (0, 0))
    value_heads, value_dim = wanted["v_proj"]
    if heads * dim == value_heads * value_dim:
        found["o_proj.weight"] = tensors["o_proj.weight"].detach().clone()
    return found
