"""Projections of softmax attention as the start of a mixer that replaces it.

H heads, K dims per head, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers.contract import MixerConfig


def take_attention_projections(old: MixerConfig, tensors: Mapping[str, Tensor],
                               wanted: Mapping[str, tuple[int, int]], norm: NormConfig) -> dict[str, Tensor]:
    """Take q, k, v and o projections of softmax attention, where heads and dims fit.

    Grouped keys and values are repeated for the heads that shared them. Weights of norms of queries and keys, and a
    fixed factor of keys, are multiplied into their projections: the direction of each query and key stays as it was.

    Args:
        old: config of the replaced mixer.
        tensors: its parameters, by name within the mixer.
        wanted: heads and dims per head of the new `q_proj`, `k_proj`, `v_proj` and `o_proj`, which is as `v_proj` where
            it is missing.
        norm: that of the model.

    Returns:
        Weights by parameter name; those that do not fit are missing.
    """
    available = old.projection_heads()
    tensors = fold_key_factor(tensors, old.key_factor())
    found = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        heads, dim = available.get(name, (0, 0))
        new_heads, new_dim = wanted.get(name, (0, 0))
        if heads and dim == new_dim and new_heads % heads == 0:
            by_head_HKD = tensors[f"{name}.weight"].detach().unflatten(0, (heads, dim))
            scale = tensors.get(name.replace("_proj", "_norm.weight"))
            if scale is not None and scale.numel() in (dim, heads * dim):
                scale = scale.detach() + norm.zero_centered
                by_head_HKD = by_head_HKD * scale.view(-1, dim, 1).to(by_head_HKD.dtype)
            found[f"{name}.weight"] = expand_heads(by_head_HKD, new_heads).flatten(0, 1)
    heads, dim = available.get("o_proj", (0, 0))
    value_heads, value_dim = wanted.get("o_proj", wanted["v_proj"])
    if heads * dim == value_heads * value_dim:
        found["o_proj.weight"] = tensors["o_proj.weight"].detach().clone()
    return found


def fold_key_factor(tensors: Mapping[str, Tensor], factor: float) -> Mapping[str, Tensor]:
    """Multiply a fixed factor of keys into their projection, for a mixer that has no such factor.

    Args:
        tensors: parameters of attention by name within the mixer.
        factor: the factor; with 1 nothing changes.
    """
    if factor == 1.0:
        return tensors
    return {name: factor * tensor.detach() if name.startswith("k_proj.") else tensor
            for name, tensor in tensors.items()}


def take_grouped_projections(new: MixerConfig, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig, *, biases: bool) -> dict[str, Tensor]:
    """Take the projections of softmax attention of as many query and key heads, and `biases` of q, k and v."""
    if new.projection_heads() != old.projection_heads():
        return {}
    found = take_attention_projections(old, tensors, new.projection_heads(), norm)
    names = [f"{name}_proj.bias" for name in "qkv"] if biases else []
    folded = fold_key_factor(tensors, old.key_factor())
    return found | {name: folded[name].detach().clone() for name in names if name in folded}


def expand_heads(by_head_HX: Tensor, heads: int) -> Tensor:
    """Repeat each key/value head for the query heads that share it: [G, ...] -> [H, ...].

    Head by head, not as a whole: query heads j r .. j r + r - 1 share head j.

    Example:
        >>> import torch
        >>> expand_heads(torch.tensor([10, 20]), heads=4).tolist()
        [10, 10, 20, 20]
    """
    return by_head_HX.repeat_interleave(heads // by_head_HX.shape[0], 0)


def spread_over_heads(value_H: Tensor, heads: int) -> Tensor:
    """Values per head for another number of heads: repeated, or averaged (geometrically) over those that become one.

    Args:
        value_H: positive values, one per head of the replaced attention.
        heads: heads of the new mixer.

    Example:
        >>> import torch
        >>> spread_over_heads(torch.tensor([2.0, 8.0]), 4).tolist()
        [2.0, 2.0, 8.0, 8.0]
        >>> round(float(spread_over_heads(torch.tensor([2.0, 8.0]), 1)), 4)
        4.0
    """
    count = value_H.shape[0]
    if heads % count == 0:
        return expand_heads(value_H, heads)
    if count % heads == 0:
        return value_H.log().unflatten(0, (heads, -1)).mean(1).exp()
    return value_H.log().mean().exp().expand(heads)
