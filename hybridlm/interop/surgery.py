"""Changes to a trained model from the words of a command line: options of an indexer, names of presets.

`hybridlm.model.edit` does the work on configs; this file reads options and presets for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm.config.paths import find_option
from hybridlm.config.paths import options as find_options
from hybridlm.config.presets import PRESET_GROUP
from hybridlm.config.serialization import choose_kind, from_dict, load_yaml
from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.model import edit
from hybridlm.model.config import ModelConfig
from hybridlm.model.edit import Transfer
from hybridlm.model.mixers import IndexerConfig
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
        config = model.config
        replaced = config.mixers[config.layers()[min(edit.check_layers(config, layers))]]
        if not replaced.projection_heads():
            raise ConfigError("layers", "already have a linear mixer: give the new mixer's config in full",
                              got=replaced.kind)
        name = name or mixer
        mixer = _fit_mixer(_read_preset(mixer), config, replaced, f"mixers.{mixer}", config.max_position)
    return edit.replace_mixers(model, layers, mixer, name, seed=seed)


def convert_attention(model: HybridLM, layers: Sequence[int], mixer: str | Mapping[str, Any], *,
                      context_length: int | None = None, calibrated: bool = False,
                      seed: int = 0) -> tuple[HybridLM, Transfer]:
    """Replace softmax attention by a mixer that starts from its weights, or give it the indexer of that mixer.

    Layers whose attention differs (heads, rotation, how it joins the residual) each get the mixer in a form that fits.
    A mixer that is itself attention with an indexer (`dsa`) leaves the attention as it is, of any kind, and adds the
    indexer to it.

    Args:
        model: the trained model, which is not changed; on the device "meta" only its config is converted.
        layers: those to convert; negative ones count from the end.
        mixer: the name of a file of `configs/mixer`, or options of a kind, whose open sizes follow the attention.
        context_length: longest sequence that it is trained on, which open blocks and budgets follow; None is that of
            the model.
        calibrated: take the form of the mixer that `hybridlm.model.calibration` can set.
        seed: of fresh weights.

    Returns:
        The new model, and the names of parameters that it took over and of those that start fresh.

    Raises:
        ConfigError: an unknown layer or preset, a layer without softmax attention, or a mixer that cannot start from
            it.

    Example:
        >>> from hybridlm import build_model, load_config
        >>> model = build_model(load_config("hybrid_tiny").model, device="meta")
        >>> model.config.layers(), convert_attention(model, [-1], "gdn")[0].config.layers()
        (['kda', 'kda', 'kda', 'full'], ['kda', 'kda', 'kda', 'gdn'])
    """
    config = model.config
    names = config.layers()
    longest = min(config.max_position, context_length or config.max_position)
    label = mixer if isinstance(mixer, str) else str(mixer.get("kind"))
    options = _read_preset(mixer) if isinstance(mixer, str) else dict(mixer)
    indexer = _kind_class(options, "mixer").indexer_options(options)
    if indexer is not None:
        unused = [] if isinstance(mixer, str) else [key for key in options if key not in ("kind", "indexer")]
        if unused:
            raise ConfigError(f"mixer.{unused[0]}", "has no effect: the attention that is there stays as it is, and "
                              "gets the indexer", got=options[unused[0]], expected="kind and indexer alone")
        if calibrated:
            raise ConfigError("init", "has no effect: attention that gets an indexer keeps its weights",
                              got="calibrated", expected="copy")
        return _convert_by_indexer(model, layers, indexer, label, longest, seed)
    groups: dict[str, list[int]] = {}
    for index in sorted(edit.check_layers(config, layers)):
        groups.setdefault(names[index], []).append(index)
    transfer = Transfer()
    for old_name, indices in groups.items():
        old = config.mixers[old_name]
        if len(old.projection_heads()) < 4:
            raise ConfigError(f"layer {indices[0]}", "has no softmax attention with plain q, k, v and o projections",
                              got=f"{old_name} ({old.kind})", expected="a layer of kind attention")
        new = _fit_mixer(options, config, old, "mixer", longest)
        new = new.calibrated_form() if calibrated else new
        if not new.can_start_from(old):
            raise ConfigError("mixer", "cannot start from the weights of attention", got=label,
                              expected="options of a kind that takes its q, k, v and o, or one of "
                                       + ", ".join(_presets_that_start_from(old, config, longest)))
        model, of_group = edit.replace_mixers(model, indices, new, label, seed=seed)
        transfer.kept += of_group.kept
        transfer.fresh += of_group.fresh
    return model, transfer


def fit_indexer(options: Mapping[str, Any], config: ModelConfig, layers: Sequence[int], path: str,
                context_length: int) -> IndexerConfig:
    """An indexer that suits each of some layers, and attends to all keys until a stage lets it select.

    Args:
        options: of an IndexerConfig; sizes and rotation that they leave open follow the layers.
        config: the model.
        layers: indices of its layers, which can take an indexer.
        path: where the options stand, for messages.
        context_length: longest sequence, which an open top-k follows.

    Raises:
        ConfigError: unknown options, or such that do not fit.
    """
    mixers = [config.mixers[name] for name in dict.fromkeys(config.layers()[index] for index in layers)]
    rope_kind = "half" if all(mixer.rotates() for mixer in mixers) else "none"
    options = {"mode": "dense", "rope_kind": rope_kind} | dict(options)
    fitted = [mixer.indexer_sizes(options, context_length) for mixer in mixers]
    sizes = {key: max(found[key] for found in fitted) for key in ("num_heads", "head_dim", "topk")
             if key not in options}
    return from_dict(IndexerConfig, options | sizes, path)


def _convert_by_indexer(model: HybridLM, layers: Sequence[int], options: Any, label: str, context_length: int,
                        seed: int) -> tuple[HybridLM, Transfer]:
    """Give the attention of some layers an indexer, where it has none yet."""
    config = model.config
    chosen = [index for index in sorted(edit.check_layers(config, layers))
              if config.mixers[config.layers()[index]].can_take_indexer()]
    if not chosen:
        raise ConfigError("mixer", "is attention with an indexer, and the layers have one already", got=label,
                          hint="leave the conversion out: their indexers are trained further as they are")
    if not isinstance(options, Mapping):
        raise ConfigError("mixer.indexer", "has the wrong type", got=options, expected="options of an indexer")
    if not all(config.mixers[config.layers()[index]].rotates() for index in chosen):
        options = {**options, "rope_kind": "none"}
    fitted = fit_indexer(options, config, chosen, "mixer.indexer", context_length)
    return edit.add_indexer(model, fitted, chosen, seed=seed)


def _kind_class(options: Mapping[str, Any], path: str) -> type[MixerConfig]:
    return choose_kind(MixerConfig, dict(options), path)[0]


def _fit_mixer(options: Mapping[str, Any], config: ModelConfig, replaced: MixerConfig, path: str,
               context_length: int) -> MixerConfig:
    """A mixer from options whose open sizes follow the layer that it replaces, and the longest sequence."""
    sizes = ModelSizes(config.hidden_size, context_length, [replaced])
    filled = _kind_class(options, path).fill_sizes(options, sizes)
    fitted = from_dict(MixerConfig, filled, path).adapted_to(replaced)  # type: ignore[type-abstract]
    # A selector that has to learn starts from fresh weights: nothing may be selected by it yet.
    return fitted.with_attention_mode("dense") if fitted.selector_parameters() and "mode" not in options else fitted


def _presets_that_start_from(old: MixerConfig, config: ModelConfig, context_length: int) -> list[str]:
    """Names of the presets of `configs/mixer` to which a layer can be converted."""
    found = []
    for name in find_options(PRESET_GROUP):
        options, path = _read_preset(name), f"mixers.{name}"
        if _kind_class(options, path).indexer_options(options) is not None and old.can_take_indexer():
            found.append(name)
            continue
        try:
            fitted = _fit_mixer(options, config, old, path, context_length)
        except ConfigError:  # it has no form for this layer
            continue
        is_full_attention = fitted.can_take_indexer()
        if fitted.can_start_from(old) and not is_full_attention:
            found.append(name)
    return found


def _read_preset(name: str) -> dict[str, Any]:
    """The options of `configs/mixer/<name>.yaml`, with those of the presets that it builds on."""
    file = find_option(PRESET_GROUP, name)
    if file is None:
        known = find_options(PRESET_GROUP)
        raise ConfigError("mixer", "no such preset", got=name, expected=f"one of {', '.join(known)}",
                          hint=did_you_mean(name, known))
    options = load_yaml(file)
    bases = [base for base in options.pop("defaults", []) if base != "_self_"]
    merged: dict[str, Any] = {}
    for base in bases:
        merged |= _read_preset(base)
    return merged | options
