"""The model of a run that converts a checkpoint: what the checkpoint holds, with an indexer in its softmax layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm.config.schema import RecipeConfig
from hybridlm.config.serialization import from_dict
from hybridlm.errors import ConfigError
from hybridlm.model.config import ModelConfig


def converted_model(recipe: RecipeConfig, init_from: str | None) -> ModelConfig:
    """The checkpoint's model with the indexer of `recipe.indexer` in `recipe.layers`. Nothing is allocated.

    Layers that have an indexer keep it, with its own options. Index queries and keys rotate where the layer's own do.
    With `share: n` in its options, every n-th converted layer gets an indexer, and those between read its selection.

    Raises:
        ConfigError: no checkpoint is named, it has no layer to convert, or a stage would select keys by an indexer
            that nothing has trained.
        CheckpointError: the checkpoint cannot be used.
    """
    from hybridlm import checkpoint
    from hybridlm.model.edit import add_indexer
    from hybridlm.model.mixers import IndexerConfig
    from hybridlm.model.model import build_model

    if init_from is None:
        raise ConfigError("init_from", "is missing", expected=f"the checkpoint that recipe={recipe.name} converts")
    if not Path(init_from).expanduser().exists():
        raise ConfigError("init_from", "no such checkpoint", got=init_from,
                          expected="a run folder or a checkpoint folder")
    config = checkpoint.read_model_config(checkpoint.resolve(init_from, hashes=False))
    layers = layers_to_convert(config, recipe.layers)
    if not layers:
        return config
    first = recipe.stages[0]
    if first.attention_mode != "dense":
        raise ConfigError("recipe.stages.0.attention_mode", "would select keys by an indexer that nothing has trained",
                          got=first.attention_mode, expected="a dense stage first (indexer_warmup)",
                          hint="or init_from a checkpoint that went through one")
    names = config.layers()
    all_rotate = all(config.mixers[names[i]].rotates() for i in layers)
    options: dict[str, Any] = {"mode": "dense", "rope_kind": "half" if all_rotate else "none"} | (recipe.indexer or {})
    share = options.pop("share", 1)
    if not isinstance(share, int) or isinstance(share, bool) or share < 1:
        raise ConfigError("recipe.indexer.share", "is how many converted layers read one indexer's selection",
                          got=share, expected="1 (each has its own), 2, 3, ...")
    try:
        indexer = from_dict(IndexerConfig, options, "indexer")
        model = add_indexer(build_model(config, device="meta"), indexer, layers[::share])[0]
        if readers := [layer for position, layer in enumerate(layers) if position % share]:
            model = add_indexer(model, dataclasses.replace(indexer, share=True), readers)[0]
        changed = model.config
    except ConfigError as error:
        inside = error.key.partition("indexer.")[2]
        raise ConfigError(f"recipe.indexer.{inside}" if inside else f"recipe.layers: {error.key}", error.what,
                          got=error.got, expected=error.expected, hint=error.hint) from None
    changed.name = f"{config.name or 'model'}_dsa"
    return changed


def layers_to_convert(config: ModelConfig, wanted: Sequence[int] | None) -> list[int]:
    """Layers that are to get an indexer: the wanted ones, or all softmax layers that see every token, without those
    that have one.

    Raises:
        ConfigError: there is no such layer, or a wanted one cannot take an indexer.
    """
    full: list[int] = []
    indexed: list[int] = []
    names = config.layers()
    for index, name in enumerate(names):
        mixer = config.mixers[name]
        if mixer.has_indexer():
            indexed.append(index)
        elif mixer.can_take_indexer():
            full.append(index)
    if wanted is None:
        if not full and not indexed:
            kinds = sorted({f"{name} ({config.mixers[name].kind})" for name in names})
            raise ConfigError("init_from", "holds a model without full attention: there is nothing to convert",
                              got=", ".join(kinds), expected="layers of kind attention (without a window) or mla")
        return full
    for index in wanted:
        if not -len(names) <= index < len(names):
            raise ConfigError("recipe.layers", "names a layer the model does not have", got=index,
                              expected=f"0 to {len(names) - 1}")
    chosen = sorted({index % len(names) for index in wanted})
    wrong = [index for index in chosen if index not in full and index not in indexed]
    if wrong or not chosen:
        raise ConfigError("recipe.layers", "names a layer that is not full attention" if wrong else "names no layer",
                          got=f"{wrong[0]} ({names[wrong[0]]})" if wrong else list(wanted),
                          expected=f"some of {sorted([*full, *indexed])}")
    return [index for index in chosen if index in full]


def has_indexer(config: ModelConfig) -> bool:
    """Whether any layer of the model is sparse attention."""
    used = {*config.layers(), config.mtp.mixer}
    return any(mixer.has_indexer() for name, mixer in config.mixers.items() if name in used)
