"""Checks of a run's config that concern several sections, so that no section can make them alone."""

from __future__ import annotations

import os
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

import torch

from hybridlm.config.legacy import upgrade_pattern
from hybridlm.config.schema import (
    NEW_MIXERS,
    REPLACED_BY_STAGE,
    SELECTORS_OF_KEYS,
    Config,
    RecipeConfig,
    StageConfig,
)
from hybridlm.distributed.engine_config import EngineConfig
from hybridlm.errors import ConfigError, did_you_mean, require
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import count_parameters
from hybridlm.model.loss_names import TEACHER_LOSSES, mixer_losses, model_losses
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.model import HybridLM
from hybridlm_kernels.registry import operations

NEEDS_SELECTION = "needs a model with sparse attention whose selection a stage can switch"
BYTE_VOCABULARY = 257  # tokens of the tokenizer `bytes`: 256 byte values and end of text


def validate(config: Config) -> None:
    """Check that the sections of `config` fit together, before anything is built.

    Raises:
        ConfigError: the first thing that does not fit.
    """
    _check_run_dir(config)
    _check_vocabulary(config)
    count_parameters(config.model)  # each part looks at the layer it stands in
    _check_kernels(config.kernels)
    config.engine.check_run(config.optimizer, config.training.precision)
    if config.training.compile:
        _check_compile(config.engine)
    for index, stage in enumerate(config.recipe.stages):
        _check_stage(config, stage, f"recipe.stages.{index}")
    recipe, model = config.recipe, config.model
    require(any(recipe.parameter_patterns(stage.trainable, model) for stage in recipe.stages),
            "recipe.stages.0.trainable", "names selectors without parameters: no stage has anything to train",
            got=SELECTORS_OF_KEYS, hint="a selector without parameters needs a stage that trains the model")
    require(recipe.dense_below is None or _selects(model), "recipe.dense_below", NEEDS_SELECTION,
            got=recipe.dense_below)


def check_effective(recipe: RecipeConfig, keys: Collection[str]) -> None:
    """Check that the settings which someone has typed are not replaced by every stage of the recipe.

    Args:
        recipe: of the run.
        keys: dotted paths of the settings.

    Raises:
        ConfigError: the first one without any effect.
    """
    for setting, replacing in REPLACED_BY_STAGE.items():
        typed = next((key for key in keys if key == setting or key.startswith(f"{setting}.")), None)
        own = [next((key for key in replacing if getattr(stage, key) is not None), None) for stage in recipe.stages]
        if typed is None or None in own:
            continue
        count = len(recipe.stages)
        raise ConfigError(typed, f"has no effect: every stage of recipe={recipe.name} sets its own",
                          expected=f"recipe.stages.N.{own[0]}{typed.removeprefix(setting)} with N "
                          + ("0" if count == 1 else f"from 0 to {count - 1}"))


def _check_run_dir(config: Config) -> None:
    """Check that the run is not written among the files that it reads; a folder below them is passed over."""
    run_dir = os.path.realpath(os.path.expanduser(config.run_dir))
    for source in config.data.sources():
        require(os.path.realpath(os.path.expanduser(source.path)) != run_dir, "run_dir", "is the folder of the text",
                got=config.run_dir, expected="another folder")


def _check_vocabulary(config: Config) -> None:
    size = config.model.vocab_size
    if config.data.tokenizer == "bytes":
        require(size >= BYTE_VOCABULARY, "model.vocab_size", "is smaller than the tokenizer's vocabulary", got=size,
                expected=f"at least {BYTE_VOCABULARY} for data.tokenizer=bytes")
    elif config.data.tokenizer == "bpe":
        wanted = config.data.tokenizer_vocab_size
        require(size >= wanted, "model.vocab_size", "is smaller than the tokenizer's vocabulary", got=size,
                expected=f"at least data.tokenizer_vocab_size={wanted}")


def _check_kernels(kernels: dict[str, Any]) -> None:
    """Check that `kernels` names known operations with one of their backends each, and `strict`."""
    known = {operation.name: [backend.name for backend in operation.backends] for operation in operations()}
    for name, value in kernels.items():
        path = f"kernels.{name}"
        if name == "strict":
            require(value is None or isinstance(value, bool), path, "has the wrong type", got=value,
                    expected="true, false or null")
            continue
        require(name in known, path, "unknown operation", expected=f"strict, or one of {', '.join(sorted(known))}",
                hint=did_you_mean(name, [*known, "strict"]))
        require(value in (None, "auto", *known[name]), path, "unknown backend", got=value,
                expected=f"auto, or one of {', '.join(known[name])}")


def _check_compile(engine: EngineConfig) -> None:
    """Check that nothing happens between processes inside a layer, whose graph it would break."""
    why = engine.why_not_compiled
    require(why is None, "training.compile", f"does not go with engine.kind={engine.kind}, which {why}", got=True,
            expected="false, or engine=ddp, zero1 or zero2")
    for key in ("context_parallel", "expert_parallel"):
        require(getattr(engine, key) == 1, "training.compile",
                f"does not go with engine.{key}, which exchanges tensors in the middle of a layer's graph", got=True,
                expected=f"false, or engine.{key}=1")


def _check_stage(config: Config, stage: StageConfig, path: str) -> None:
    training, limit = config.training, config.model.max_position
    own_length = stage.sequence_length is not None
    length = stage.sequence_length if stage.sequence_length is not None else training.sequence_length
    require(length <= limit, f"{path}.sequence_length" if own_length else "training.sequence_length",
            "is longer than the model is meant for", got=length, expected=f"at most model.max_position={limit}")
    batch, micro = stage.batch_size, training.micro_batch_size
    require(batch is None or micro is None or batch % micro == 0, f"{path}.batch_size",
            "does not divide into micro batches", got=batch,
            expected=f"a multiple of training.micro_batch_size={micro}")
    selects = _selects(config.model)
    for key in ("attention_mode", "topk", "dense_layers"):
        require(selects or not getattr(stage, key), f"{path}.{key}", NEEDS_SELECTION, got=getattr(stage, key),
                hint="convert a checkpoint with recipe=sparse_tiny init_from=..., or take a model such as kda_dsa_tiny")
    if stage.topk is not None:
        _check_topk(config.model, stage.topk, f"{path}.topk")
    _check_dense_layers(config.model, stage.dense_layers, f"{path}.dense_layers")
    _check_losses(config.model, stage.loss_weights, f"{path}.loss_weights")
    compared = [name for name in TEACHER_LOSSES if stage.loss_weights.get(name)]
    require(not compared or config.teacher is not None, f"{path}.loss_weights.{compared[0] if compared else ''}",
            "needs a teacher", expected="teacher=RUN, a run or checkpoint folder")
    for key, asked in (("loss_weights.layer_output", stage.loss_weights.get("layer_output")),
                       ("inputs", stage.inputs == "teacher")):
        require(not asked or config.recipe.convert is not None, f"{path}.{key}", "needs converted layers",
                expected="recipe.convert, as in recipe=linearize")
    for key, patterns in (("trainable", stage.trainable), ("lr_scale", list(stage.lr_scale))):
        require(NEW_MIXERS not in patterns or config.recipe.convert is not None, f"{path}.{key}",
                "names the mixers that recipe.convert puts in, and there is none", got=NEW_MIXERS)
        require(SELECTORS_OF_KEYS not in patterns or selects, f"{path}.{key}",
                "names selectors of sparse attention, and no layer has one", got=SELECTORS_OF_KEYS)
        written = config.recipe.parameter_patterns(patterns, config.model)
        if written and written != ["*"]:
            check_patterns(written, parameter_names(config), f"{path}.{key}")


def _check_topk(model: ModelConfig, topk: int, path: str) -> None:
    """Check that every mixer that selects can select so many keys."""
    for name in model.used_mixers():
        multiple = model.mixers[name].topk_multiple()
        require(topk % multiple == 0, path, f"is not a number of whole pools or blocks of mixer {name}", got=topk,
                expected=f"a multiple of {multiple}")
        try:
            model.mixers[name].with_topk(topk)
        except ConfigError as error:
            raise ConfigError(path, f"does not fit mixer {name}: {error.key} {error.what}", got=topk,
                              expected=error.expected) from None


def _check_losses(model: ModelConfig, weights: dict[str, float], path: str) -> None:
    """Check that the model has every loss to which a stage gives a weight.

    A weight of 0 may name a loss that the model lacks, so that one recipe suits many models. But a mixer's loss has to
    be there: a 0 that is meant for a selector would leave the one that is there learning.
    """
    known = (*model_losses(model), *TEACHER_LOSSES)
    for name, weight in weights.items():
        require(name in known or (weight == 0 and name not in mixer_losses()), f"{path}.{name}",
                "is a loss that the model does not have", got=weight, expected=f"one of {', '.join(known)}")


def _check_dense_layers(model: ModelConfig, layers: list[int], path: str) -> None:
    """Check that layers which are to be dense select keys, and that no sparse layer reads the selection of one."""
    if not layers:
        return
    for layer in layers:
        require(-model.num_layers <= layer < model.num_layers, path, "names a layer the model does not have", got=layer,
                expected=f"0 to {model.num_layers - 1}")
    names = model.layers()
    dense = {layer % model.num_layers for layer in layers}
    switched = [index for index, name in enumerate(names) if _has_selection(model.mixers[name])]
    for layer in layers:
        require(layer % model.num_layers in switched, path, "names a layer without a selection to switch off",
                got=layer, expected=f"some of {switched}")
    for index, name in enumerate(names):
        mixer = model.mixers[name]
        if index in dense or not mixer.has_indexer():
            continue
        context = model.layer_context(index)
        sources = {context.source_of(read) for read in mixer.reads(context)} & dense
        require(not sources, path, f"names a layer whose selection layer {index} reads", got=next(iter(sources), None),
                hint=f"name layer {index} too")


def _has_selection(mixer: MixerConfig) -> bool:
    return mixer.has_indexer() or mixer.has_selector()


def _selects(model: ModelConfig) -> bool:
    """Whether a stage can switch what any layer or block of multi-token prediction reads."""
    return any(_has_selection(model.mixers[name]) for name in model.used_mixers())


def model_has_indexer(config: ModelConfig) -> bool:
    """Whether any layer or block of multi-token prediction reads only keys that an indexer selects."""
    return any(config.mixers[name].has_indexer() for name in config.used_mixers())


def check_patterns(patterns: list[str], names: list[str], path: str) -> None:
    """Check that every shell pattern matches at least one parameter name.

    Raises:
        ConfigError: the first pattern that matches none, with the nearest name.
    """
    for index, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{path}.{index}", "matches no parameter of the model", got=pattern,
                              expected="a shell pattern over parameter names",
                              hint=_renamed(pattern) or did_you_mean(pattern.replace("*", ""), names))


def _renamed(pattern: str) -> str:
    """The hint for a pattern over the parameter names of an earlier version; "" for any other pattern."""
    now = upgrade_pattern(pattern)
    return f"parameters were renamed: '{now}'" if now != pattern else ""


def parameter_names(config: Config) -> list[str]:
    """Names of the model's parameters. The model is built on the meta device, so nothing is allocated."""
    with torch.device("meta"):
        return [name for name, _ in HybridLM(config.model).named_parameters()]
