"""Conversions of a trained model: adding indexers (sparse attention), replacing softmax mixers by linear ones.

Everything else keeps its weights and their names. The result is an ordinary model, to be saved and trained on.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridlm.errors import ConfigError
from hybridlm.model.config import ModelConfig, ScheduleConfig
from hybridlm.model.cost import mtp_block
from hybridlm.model.mixers import IndexerConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.model import HybridLM, build_model
from hybridlm.model.run_adapters import PerRunLinear
from hybridlm.model.stand_ins import block_of
from hybridlm.tensor_storage import unique_tensors


@dataclass
class Transfer:
    """Parameters of the changed layers, by name, and where their weights come from.

    Args:
        kept: taken over from the replaced mixer.
        fresh: initialised.
    """

    kept: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)


def add_indexer(model: HybridLM, indexer: IndexerConfig, layers: Sequence[int] | None = None, *,
                seed: int = 0) -> tuple[HybridLM, Transfer]:
    """Give a trained model fresh indexers: the start of a conversion into DeepSeek sparse attention.

    Args:
        model: the trained model, which is not changed.
        indexer: with `mode: dense` the result computes what `model` computes, and the indexer can be trained;
            `mode: sparse` selects keys at once.
        layers: those to convert, negative ones counted from the end; None takes every layer of softmax attention over
            all tokens.
        seed: of the fresh weights.

    Returns:
        The new model, and the names of parameters that it took over and of those that start fresh.

    Raises:
        ConfigError: a layer that is not softmax attention over all tokens, or has an indexer already.
    """
    config = model.config
    names = config.layers()
    if layers is None:
        layers = [i for i, name in enumerate(names)
                  if config.mixers[name].can_take_indexer() or config.mixers[name].has_indexer()]
    chosen = check_layers(config, layers)
    for index in sorted(chosen):
        if not config.mixers[names[index]].can_take_indexer():
            raise ConfigError(f"layer {index}", "cannot take an indexer", got=names[index],
                              expected="softmax attention over all tokens without an indexer")
    mixers = dict(config.mixers)
    new_names = list(names)
    for name in sorted({names[i] for i in chosen}):
        users = {i for i, other in enumerate(names) if other == name}
        new_name = name if users <= chosen and config.mtp.mixer != name else f"{name}_dsa"
        if indexer.share:
            new_name = f"{name}_dsa_shared"
        mixers[new_name] = config.mixers[name].with_indexer(indexer)
        for i in users & chosen:
            new_names[i] = new_name
    changed = _rebuild_config(config, new_names, mixers)
    return _transfer_weights(model, changed, unique_tensors(model), seed, chosen)


def replace_mixers(model: HybridLM, layers: Sequence[int], mixer: MixerConfig, name: str | None = None, *,
                   seed: int = 0) -> tuple[HybridLM, Transfer]:
    """Put another mixer into some layers of a trained model.

    The new mixer says what it takes over from the old one (`initial_weights_from`): a linear mixer takes q, k, v and o
    of softmax attention wherever shapes allow. How the branch joins the residual stays the layer's own.

    Args:
        model: the trained model, which is not changed.
        layers: negative ones count from the end.
        mixer: config of the new mixer.
        name: of the new mixer in the schedule; None takes its kind.
        seed: of the fresh weights.

    Returns:
        The new model, and the names of parameters that it took over and of those that start fresh.

    Raises:
        ConfigError: an unknown layer, one whose runs differ in the mixer, or layers whose branches join the residual
            in different ways.
    """
    config = model.config
    chosen = check_layers(config, layers)
    names = config.layers()
    replaced = [config.mixers[names[i]] for i in sorted(chosen)]
    if any(m.residual != replaced[0].residual for m in replaced):
        raise ConfigError("layers", "have different residual forms: replace them apart", got=sorted(chosen))
    empty = [i for i in sorted(chosen) if not config.mixers[names[i]].is_branch]
    if empty:
        raise ConfigError("layers", "have no mixer to replace", got=empty)
    per_run = [i for i in sorted(chosen)
               if any(isinstance(part, PerRunLinear) for part in block_of(model, i).mixer.modules())]
    if per_run:
        raise ConfigError("layers", "have weights of single runs in their mixer (schedule.run_adapters), which no "
                          "other mixer takes over", got=per_run, expected="layers whose mixer is the same in all runs")
    alone = {names[i] in config.schedule.alone for i in chosen}
    if len(alone) > 1:
        raise ConfigError("layers", "are with and without a feed-forward: replace them apart", got=sorted(chosen))
    mixer = copy.deepcopy(mixer)
    mixer.residual = replaced[0].residual
    name = _find_free_name(name or mixer.kind, config, mixer, alone.pop())
    new_names = [name if i in chosen else other for i, other in enumerate(names)]
    changed = _rebuild_config(config, new_names, dict(config.mixers) | {name: mixer})
    weights = unique_tensors(model)
    for i in sorted(chosen):
        prefix = f"layers.{i}.mixer."
        of_layer = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
        initial = mixer.initial_weights_from(config.mixers[names[i]], of_layer, config.norm)
        weights |= {prefix + key: tensor for key, tensor in initial.items()}
    return _transfer_weights(model, changed, weights, seed, chosen)


def leave_dense(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Return the model with some layers that attend to all keys, where its mixers of the same name select them.

    A mixer gets a second name, with `_dense` behind it, unless all layers that have it are to be dense.

    Args:
        config: the model.
        layers: indices from 0 on.
    """
    names = config.layers()
    mixers = dict(config.mixers)
    new_names = list(names)
    of_mtp = mtp_block(config)[1] if config.mtp.depth else None
    for name in dict.fromkeys(names[index] for index in layers):
        users = {index for index, other in enumerate(names) if other == name}
        dense = mixers[name].with_attention_mode("dense")
        if dense == mixers[name]:
            continue
        new_name = name
        if not users <= set(layers) or of_mtp == name:
            new_name = _find_free_name(f"{name}_dense", config, dense, name in config.schedule.alone)
        mixers[new_name] = dense
        for index in users & set(layers):
            new_names[index] = new_name
    if mixers == config.mixers:
        return config
    return dataclasses.replace(_rebuild_config(config, new_names, mixers), name=config.name, published=config.published)


def check_layers(config: ModelConfig, layers: Sequence[int]) -> set[int]:
    """Convert layer indices, of which negative ones count from the end, to indices from 0 on.

    Raises:
        ConfigError: a layer that the model does not have, or none at all.
    """
    for index in layers:
        if not -config.num_layers <= index < config.num_layers:
            raise ConfigError("layers", "names a layer the model does not have", got=index,
                              expected=f"0 to {config.num_layers - 1}")
    if not layers:
        raise ConfigError("layers", "names no layer", got=list(layers))
    return {index % config.num_layers for index in layers}


def _find_free_name(name: str, config: ModelConfig, mixer: MixerConfig, alone: bool) -> str:
    """Find a free name: `name`, with a number appended where another mixer has it, or it stands alone unlike this."""
    found = name
    number = 2
    while found in config.mixers and (config.mixers[found] != mixer or (found in config.schedule.alone) != alone):
        found = f"{name}_{number}"
        number = number + 1
    return found


def _rebuild_config(config: ModelConfig, layers: list[str], mixers: dict[str, MixerConfig]) -> ModelConfig:
    """Rebuild the config with this layer list; an MTP block keeps its mixer."""
    mtp = config.mtp
    if mtp.depth and mtp.mixer is None:
        mtp = dataclasses.replace(mtp, mixer=config.layers()[-1])
    used = {*layers, mtp.mixer}
    renamed = [*zip(layers, config.layers(), strict=True), (mtp.mixer, mtp.mixer)]
    alone = dict.fromkeys(new for new, old in renamed if new is not None and old in config.schedule.alone)
    runs = {key: getattr(config.schedule, key) for key in ("reuse", "repeat", "run_adapters")}
    schedule = ScheduleConfig(pattern=layers, alone=[*alone], **runs)
    return dataclasses.replace(config, schedule=schedule, mtp=mtp, name="", published=None,
                               mixers={name: m for name, m in mixers.items() if name in used or name in config.mixers})


def _transfer_weights(model: HybridLM, config: ModelConfig, weights: Mapping[str, Tensor], seed: int,
                      changed: set[int]) -> tuple[HybridLM, Transfer]:
    """A model of `config` with `weights`, by name; all other parameters are initialised."""
    result = build_model(config, seed=seed, device=model.device).to(model.embed.weight.dtype)
    transfer = Transfer()
    with torch.no_grad():
        for name, tensor in unique_tensors(result).items():
            is_changed = ".mixer." in name and name.startswith("layers.") and int(name.split(".")[1]) in changed
            if name in weights:
                given = weights[name]
                tensor.copy_(torch.where(given.isnan(), tensor, given) if is_changed else given)
            if is_changed:
                (transfer.kept if name in weights else transfer.fresh).append(name)
    result.tokenizer = getattr(model, "tokenizer", None)  # type: ignore[assignment]
    return result.train(model.training), transfer
