"""Changing what a trained model is made of: sparse attention for dense, linear mixers for softmax ones.

The rest of the model keeps its weights and their names. The result is an ordinary checkpoint, to be trained on.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridlm.config.serialization import from_dict, load_yaml
from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.model.config import ModelConfig, ScheduleConfig
from hybridlm.model.mixers import AttentionConfig, IndexerConfig, MLAConfig
from hybridlm.model.mixers.common.recurrent import RecurrentConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.model import HybridLM, build_model
from hybridlm.tensor_storage import unique_tensors


@dataclass
class Transfer:
    """Where the weights of the changed layers come from, by parameter name."""

    kept: list[str] = field(default_factory=list)  # from the replaced mixer
    fresh: list[str] = field(default_factory=list)  # initialised


def add_indexer(model: HybridLM, indexer: IndexerConfig | Mapping[str, Any], layers: Sequence[int] | None = None, *,
                seed: int = 0) -> tuple[HybridLM, Transfer]:
    """The start of a conversion into DeepSeek sparse attention: the same model with a fresh indexer in `layers`.

    `layers` null takes every softmax layer. With `mode: dense` (the default here) the model computes what it computed
    before, and the indexer can be trained; `mode: sparse` selects at once.

    Raises:
        ConfigError: a layer that is not softmax attention, or has an indexer already.
    """
    option = dataclasses.asdict(indexer) if isinstance(indexer, IndexerConfig) else {"mode": "dense", **indexer}
    config = model.config
    names = config.layers()
    if layers is None:
        layers = [i for i, name in enumerate(names) if isinstance(config.mixers[name], AttentionConfig | MLAConfig)]
    chosen = _checked(config, layers)
    for index in sorted(chosen):
        mixer = config.mixers[names[index]]
        if not isinstance(mixer, AttentionConfig | MLAConfig) or mixer.indexer is not None:
            raise ConfigError(f"layer {index}", "cannot take an indexer", got=names[index],
                              expected="softmax attention without one")
    mixers, replaced = dict(config.mixers), list(names)
    for name in sorted({names[i] for i in chosen}):
        users = {i for i, other in enumerate(names) if other == name}
        new = name if users <= chosen and config.mtp.mixer != name else f"{name}_dsa"
        if option.get("share"):
            new = f"{name}_dsa_shared"
        mixers[new] = copy.deepcopy(config.mixers[name])
        mixers[new].indexer = from_dict(IndexerConfig, option, f"mixers.{new}.indexer")  # type: ignore[attr-defined]
        mixers[new].__post_init__()  # type: ignore[attr-defined]
        for i in users & chosen:
            replaced[i] = new
    changed = _rebuilt(config, replaced, mixers)
    return _transfer(model, changed, unique_tensors(model), seed, chosen)


def replace_mixers(model: HybridLM, layers: Sequence[int], mixer: MixerConfig | str, name: str | None = None, *,
                   seed: int = 0) -> tuple[HybridLM, Transfer]:
    """The model with another mixer in `layers`, its q, k, v and o taken from the old one wherever shapes allow.

    `mixer` is a config, or the name of a file of `configs/mixer` (gdn, kda, lightning, ...), which then gets the heads
    of what it replaces. Grouped keys and values are repeated for the heads that shared them. The residual form stays
    the layer's own.

    Raises:
        ConfigError: an unknown layer or mixer name, or layers with different residual forms.
    """
    config = model.config
    chosen = _checked(config, layers)
    names = config.layers()
    old = [config.mixers[names[i]] for i in sorted(chosen)]
    if any(m.residual != old[0].residual for m in old):
        raise ConfigError("layers", "have different residual forms: replace them apart", got=sorted(chosen))
    if isinstance(mixer, str):
        name, mixer = name or mixer, matching_mixer(mixer, old[0])
    mixer = copy.deepcopy(mixer)
    mixer.residual = old[0].residual
    name = _free_name(name or mixer.kind, config, mixer)
    replaced = [name if i in chosen else other for i, other in enumerate(names)]
    changed = _rebuilt(config, replaced, dict(config.mixers) | {name: mixer})
    weights = unique_tensors(model)
    for i in sorted(chosen):
        prefix = f"layers.{i}.mixer."
        of_layer = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
        weights |= {prefix + key: t for key, t in projections(config.mixers[names[i]], mixer, of_layer).items()}
    return _transfer(model, changed, weights, seed, chosen)


def matching_mixer(preset: str, old: MixerConfig) -> MixerConfig:
    """The mixer of `configs/mixer/<preset>.yaml` with the heads of a softmax mixer.

    Raises:
        ConfigError: no such preset, or a mixer without heads to take over.
    """
    from hybridlm.config.paths import config_dir

    folder = config_dir() / "mixer"
    file = folder / f"{preset}.yaml"
    if not file.is_file():
        known = sorted(f.stem for f in folder.glob("*.yaml"))
        raise ConfigError("mixer", "no such preset", got=preset, expected=f"one of {', '.join(known)}",
                          hint=did_you_mean(preset, known))
    if isinstance(old, AttentionConfig):
        heads, dim = old.num_heads, old.head_dim
    elif isinstance(old, MLAConfig):
        heads, dim = old.num_heads, old.v_head_dim
    else:
        raise ConfigError("layers", "already have a linear mixer: give the new mixer's config in full", got=old.kind)
    data = {key: value for key, value in load_yaml(file).items() if key != "defaults"}
    if data.get("decay") == "channel" and data.get("kind") == "delta_rule":
        data |= {"gate_rank": dim, "output_gate_rank": dim}
    return from_dict(MixerConfig, data | {"num_heads": heads, "head_dim": dim}, f"mixers.{preset}")


def projections(old: MixerConfig, new: MixerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q, k, v and o of the new mixer from those of the old one: those whose heads fit, by parameter name."""
    if not isinstance(old, AttentionConfig | MLAConfig) or not isinstance(new, RecurrentConfig):
        return {}
    wanted = {"q_proj.weight": (new.num_heads, new.head_dim), "k_proj.weight": (new.num_heads, new.head_dim),
              "v_proj.weight": (new.value_heads, new.value_dim)}
    if isinstance(old, AttentionConfig):
        had = {"q_proj.weight": (old.num_heads, old.head_dim), "k_proj.weight": (old.kv_heads, old.head_dim),
               "v_proj.weight": (old.kv_heads, old.head_dim)}
        out = old.num_heads * old.head_dim
    else:
        had = {"q_proj.weight": (old.num_heads, old.qk_head_dim)} if old.q_lora_rank is None else {}
        out = old.num_heads * old.v_head_dim
    found = {}
    for key, (heads, dim) in had.items():
        new_heads, new_dim = wanted[key]
        if dim == new_dim and new_heads % heads == 0:
            by_head = tensors[key].detach().unflatten(0, (heads, dim))
            found[key] = by_head.repeat_interleave(new_heads // heads, 0).flatten(0, 1)
    if new.value_heads * new.value_dim == out:
        found["o_proj.weight"] = tensors["o_proj.weight"].detach().clone()
    return found


def _checked(config: ModelConfig, layers: Sequence[int]) -> set[int]:
    for index in layers:
        if not -config.num_layers <= index < config.num_layers:
            raise ConfigError("layers", "names a layer the model does not have", got=index,
                              expected=f"0 to {config.num_layers - 1}")
    if not layers:
        raise ConfigError("layers", "names no layer", got=list(layers))
    return {index % config.num_layers for index in layers}


def _free_name(name: str, config: ModelConfig, mixer: MixerConfig) -> str:
    """`name`, or with a number behind it where another mixer has it."""
    found, number = name, 2
    while found in config.mixers and config.mixers[found] != mixer:
        found, number = f"{name}_{number}", number + 1
    return found


def _rebuilt(config: ModelConfig, layers: list[str], mixers: dict[str, MixerConfig]) -> ModelConfig:
    """The config with this layer list; an MTP block keeps the mixer it had."""
    mtp = config.mtp
    if mtp.depth and mtp.mixer is None:
        mtp = dataclasses.replace(mtp, mixer=config.layers()[-1])
    used = {*layers, mtp.mixer}
    return dataclasses.replace(config, schedule=ScheduleConfig(pattern=layers), mtp=mtp, name="", published=None,
                               mixers={name: m for name, m in mixers.items() if name in used or name in config.mixers})


def _transfer(model: HybridLM, config: ModelConfig, weights: Mapping[str, Tensor], seed: int,
              changed: set[int]) -> tuple[HybridLM, Transfer]:
    """A model of `config` with `weights`, by name; the rest is initialised."""
    result = build_model(config, seed=seed, device=model.device).to(model.embed.weight.dtype)
    transfer = Transfer()
    with torch.no_grad():
        for name, tensor in unique_tensors(result).items():
            if name in weights:
                tensor.copy_(weights[name])
            if ".mixer." in name and name.startswith("layers.") and int(name.split(".")[1]) in changed:
                (transfer.kept if name in weights else transfer.fresh).append(name)
    result.tokenizer = getattr(model, "tokenizer", None)  # type: ignore[assignment]
    return result.train(model.training), transfer
