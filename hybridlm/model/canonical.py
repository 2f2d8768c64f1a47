"""Canonical form of a model: what it computes as plain data, without names, defaults and training options.

Two configs that agree here are one model. An export writes a config.json, reads it back, and says what got lost.
"""

from __future__ import annotations

from typing import Any

from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import mtp_block
from hybridlm.plain_data import to_dict


def canonical(config: ModelConfig) -> dict[str, Any]:
    """Make plain data, layer by layer, of everything that the logits depend on.

    Args:
        config: the model.
    """
    layers = [_describe_layer(config, index, name) for index, name in enumerate(config.layers())]
    mtp = [_describe_layer(config, *mtp_block(config)) for _ in range(config.mtp.depth)]
    order = config.runs()
    several = {} if len(order) == config.num_layers else {
        "runs": order, "run_adapters": to_dict(config.schedule.run_adapters)}
    return several | {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_layers": config.num_layers,
        "norm": to_dict(config.norm), "tie_embeddings": config.tie_embeddings,
        "logit_soft_cap": config.logit_soft_cap, "logit_multiplier": config.logit_multiplier,
        "embedding_scale": config.embedding_scale,
        "residual": to_dict(config.residual), "layers": layers, "mtp": mtp,
    }


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(path, value in a, value in b) wherever two plain data differ; a key that one side lacks counts as null.

    >>> differences({"norm": {"eps": 1e-6}, "layers": [1, 2]}, {"norm": {"eps": 1e-5}, "layers": [1, 2]})
    [('norm.eps', 1e-06, 1e-05)]
    """
    found: list[tuple[str, Any, Any]] = []
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            found += differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            found += differences(x, y, f"{path}.{index}")
    elif a != b:
        found.append((path, a, b))
    return found


def _describe_layer(config: ModelConfig, index: int, name: str) -> dict[str, Any]:
    own, following = (to_dict(branch) for branch in config.branches(name))
    return {"mixer": {**config.mixers[name].canonical(config.norm), "residual": own}, "residual": following,
            "feed_forward": config.feed_forward_after(name).canonical(config.layer_context(index))}
