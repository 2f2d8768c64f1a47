"""Changes to a trained model from the words of a command line: options of an indexer, names of presets.

`hybridlm.model.edit` does the work on configs; this file reads options and presets for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm.config.paths import config_dir
from hybridlm.config.serialization import from_dict, load_yaml
from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.model import edit
from hybridlm.model.edit import Transfer
from hybridlm.model.mixers import MIXERS, IndexerConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.model import HybridLM


def add_indexer(model: HybridLM, options: Mapping[str, Any] | None = None, layers: Sequence[int] | None = None, *,
                seed: int = 0) -> tuple[HybridLM, Transfer]:
    """Add a fresh indexer to the softmax layers of a model; its outputs stay the same until the mode is sparse.

    Args:
        model: the trained model, which is not changed.
        options: of IndexerConfig; `mode: sparse` selects keys at once, instead of `dense`.
        layers: those to convert; None takes every layer of softmax attention over all tokens.
        seed: of the fresh weights.

    Returns:
        The new model, and the names of parameters that it took over and of those that start fresh.

    Raises:
        ConfigError: unknown options, or a layer that cannot take an indexer.
    """
    indexer = from_dict(IndexerConfig, {"mode": "dense", **(options or {})}, "indexer")
    return edit.add_indexer(model, indexer, layers, seed=seed)


def replace_mixers(model: HybridLM, layers: Sequence[int], mixer: MixerConfig | str, name: str | None = None, *,
                   seed: int = 0) -> tuple[HybridLM, Transfer]:
    """Replace the mixer of some layers; the new one takes over q, k, v and o projections where shapes allow.

    Args:
        model: the trained model, which is not changed.
        layers: negative ones count from the end.
        mixer: a config, or the name of a file of `configs/mixer` (gdn, kda, lightning, ...), which then gets the heads
            of the mixer that it replaces.
        name: of the new mixer in the schedule; None takes the preset's name, or the config's kind.
        seed: of the fresh weights.

    Returns:
        The new model, and the names of parameters that it took over and of those that start fresh.

    Raises:
        ConfigError: an unknown layer or preset, layers whose branches join the residual in different ways, or a preset
            for a layer without softmax attention.
    """
    if isinstance(mixer, str):
        options = _read_preset(mixer)
        config = model.config
        replaced = config.mixers[config.layers()[min(edit.check_layers(config, layers))]]
        if not replaced.projection_heads():
            raise ConfigError("layers", "already have a linear mixer: give the new mixer's config in full",
                              got=replaced.kind)
        sizes = ModelSizes(config.hidden_size, config.max_position, [replaced])
        options = MIXERS.config_class(options["kind"]).fill_sizes(options, sizes)  # type: ignore[attr-defined]
        name = name or mixer
        mixer = from_dict(MixerConfig, options, f"mixers.{mixer}")  # type: ignore[type-abstract]
    return edit.replace_mixers(model, layers, mixer, name, seed=seed)


def _read_preset(name: str) -> dict[str, Any]:
    """The options of `configs/mixer/<name>.yaml`, with those of the presets that it builds on."""
    folder = config_dir() / "mixer"
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = sorted(f.stem for f in folder.glob("*.yaml"))
        raise ConfigError("mixer", "no such preset", got=name, expected=f"one of {', '.join(known)}",
                          hint=did_you_mean(name, known))
    options = load_yaml(file)
    bases = [base for base in options.pop("defaults", []) if base != "_self_"]
    merged: dict[str, Any] = {}
    for base in bases:
        merged |= _read_preset(base)
    return merged | options
