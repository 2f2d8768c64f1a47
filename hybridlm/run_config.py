"""The config of a run from a name and overrides: composing, and what a run takes from a checkpoint.

    config = load_config("train", ["model=kimi_linear_tiny", "training.steps=100"])
    config = load_config("train", ["init_from=runs/first", "data.path=texts/"])      # its model and tokenizer
    config = load_config("train", ["recipe=dsa_tiny", "init_from=runs/first"])       # its model with indexers
    config = load_config("train", ["branch_from=runs/first", "optimizer.lr=1e-4"])   # all of its settings

`hybridlm.config` composes and checks, and knows no checkpoint. So loading a config stands above both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm import checkpoint
from hybridlm.config.checks import model_has_indexer
from hybridlm.config.compose import Composition, compose_run, override_keys, override_value, quote
from hybridlm.config.schema import Config, DataConfig, RecipeConfig, TrainingConfig
from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import ConfigError, did_you_mean_path
from hybridlm.interop.linearization import plan_conversion
from hybridlm.interop.surgery import fit_indexer
from hybridlm.model.config import ModelConfig
from hybridlm.model.edit import add_indexer
from hybridlm.model.model import build_model


def load_config(name: str = "train", overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """Compose and check the config of a whole run.

    Where `run_dir=` names a run that has begun, or `branch_from=` a checkpoint, what is not set comes from that run.
    With `init_from=` the model and the tokenizer come from the checkpoint, unless they are set.

    Args:
        name: a root config ("train"), an experiment or a model of the built-in ones, or a YAML file such as the
            config.yaml of a checkpoint.
        overrides: those of the command line: "model=qwen3_next_tiny", "training.steps=100", "model=path/to/mine.yaml".
        config_dir: a folder of your own configs, laid out as the built-in one and searched before it.

    Raises:
        ConfigError: anything wrong with a name, a key or a value.
        CheckpointError: the checkpoint that the run starts from cannot be used.

    Example:
        >>> config = load_config("train", ["model=kimi_linear_tiny", "optimizer.lr=2e-3"])
        >>> config.model.layers(), config.optimizer.lr
        (['kda', 'kda', 'kda', 'full', 'kda', 'kda', 'full'], 0.002)
    """
    overrides = [str(override) for override in overrides]
    started = _started_run(name, overrides)
    if started is not None:
        composed = compose_run(str(started), overrides, config_dir)
        _require_own_conversion(composed, started)
        if composed.has("recipe.convert") and composed.value("recipe.convert.converted") is None:
            _plan_conversion(composed)  # recipe=... on the command line stands for the recipe before it was planned
        return composed.finish()
    branch = override_value(overrides, "branch_from")
    if branch is not None:
        return _compose_branch(name, overrides, str(branch), config_dir)
    composed = compose_run(name, overrides, config_dir)
    _find_start_of_conversion(composed)
    if composed.has("init_from") and not _holds_checkpoint(composed.value("run_dir")):
        _take_from_checkpoint(composed, name)
    elif _converts(composed) and not composed.from_file:
        _convert(composed)
    return composed.finish()


def _find_start_of_conversion(composed: Composition) -> None:
    """Let a run that converts its teacher start from it; without one it starts from `init_from`.

    Raises:
        ConfigError: a conversion without a checkpoint, or stages that compare with a teacher without one.
    """
    if not composed.has("recipe.convert"):
        return
    if composed.has("teacher"):
        if not composed.has("init_from"):
            composed.set("init_from", composed.value("teacher"))
        return
    recipe = from_dict(RecipeConfig, composed.value("recipe"), "recipe", root=Config)
    compares = any(stage.aligns_layers() or stage.compares_models() for stage in recipe.stages)
    if compares or not composed.has("init_from"):
        name = composed.value("recipe.name")
        raise ConfigError("teacher" if compares else "init_from", "is missing",
                          expected=f"the run or checkpoint that recipe={name} converts",
                          hint="hybridlm import brings a checkpoint of transformers here")


def _source_key(composed: Composition) -> str:
    """The key that names the checkpoint from which a run starts: `teacher` where that is it."""
    is_teacher = composed.has("teacher") and composed.value("teacher") == composed.value("init_from")
    return "teacher" if is_teacher else "init_from"


def _converts(composed: Composition) -> bool:
    """Whether the recipe makes its model from that of a checkpoint."""
    return composed.has("recipe.indexer") or composed.has("recipe.convert")


def _started_run(name: str, overrides: list[str]) -> Path | None:
    """The config.yaml of the run that `run_dir=` names, if it holds a checkpoint and nothing else says the settings."""
    run_dir = override_value(overrides, "run_dir")
    if name != "train" or not isinstance(run_dir, str) or {"model", "experiment"} & override_keys(overrides):
        return None
    return Path(run_dir).expanduser() / "config.yaml" if _holds_checkpoint(run_dir) else None


def _require_own_conversion(composed: Composition, started: Path) -> None:
    """Check that a run that has begun did so with the conversion that the command line asks for, if it asks for one.

    Raises:
        ConfigError: the folder holds a run that converted nothing, such as the one to convert.
    """
    recipe = checkpoint.read_config(started.parent).get("recipe") or {}
    for key in ("convert", "indexer"):
        if composed.has(f"recipe.{key}") and not recipe.get(key):
            name = composed.value("recipe.name")
            raise ConfigError("run_dir", f"holds a run that has not begun with recipe={name}", got=str(started.parent),
                              expected="a new folder for the converted model, or the folder of such a run")


def _holds_checkpoint(run_dir: Any) -> bool:
    """Whether a run has begun in a folder and left a checkpoint there: from then on its own config counts."""
    folder = Path(str(run_dir)).expanduser()
    return (folder / "config.yaml").is_file() and bool(checkpoint.step_folders(folder / "checkpoints"))


def _compose_branch(name: str, overrides: list[str], source: str, config_dir: str | Path | None) -> Config:
    """The config of a branch: that of the checkpoint it starts from, with the overrides on top."""
    folder = _find_checkpoint(source, "branch_from")
    composed = compose_run(str(folder / "config.yaml") if name == "train" else name, overrides, config_dir)
    recipe = checkpoint.read_config(folder).get("recipe") or {}
    if composed.has("recipe.indexer") and composed.value("recipe.indexer") != recipe.get("indexer"):
        raise ConfigError("recipe.indexer", "converts a model, and a branch keeps its model",
                          got=composed.value("recipe.name"),
                          hint=f"init_from={source} in place of branch_from starts the conversion")
    if composed.has("recipe.convert") and composed.value("recipe.convert.converted") is None:
        raise ConfigError("recipe.convert", "converts a model, and a branch keeps its model",
                          got=composed.value("recipe.name"),
                          hint=f"{'teacher' if composed.has('teacher') else 'init_from'}={source} in place of "
                               "branch_from starts the conversion")
    if not composed.overrides("init_from"):
        composed.set("init_from", None)
    if not composed.overrides("run_dir") and name == "train":
        parent = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        composed.set("run_dir", f"{parent}-branch")
    _take_tokenizer(composed, source, folder)
    return composed.finish()


def _take_from_checkpoint(composed: Composition, name: str) -> None:
    """Take the model and the tokenizer of the checkpoint `init_from`, as far as nothing else is said of them."""
    source = str(composed.value("init_from"))
    folder = _find_checkpoint(source, _source_key(composed))
    if _converts(composed):
        _convert(composed)
    elif name == "train" and not composed.choices.keys() & {"model", "experiment"}:
        composed.replace_model(to_dict(checkpoint.read_model_config(folder)))
    _take_tokenizer(composed, source, folder)


def _convert(composed: Composition) -> None:
    """Take the model of the checkpoint, with the mixers and indexers of the recipe in its layers."""
    recipe = from_dict(RecipeConfig, composed.value("recipe"), "recipe", root=Config)
    # The config.yaml of a run that converted a checkpoint holds the converted model already.
    if recipe.convert is None:
        done = composed.from_file and model_has_indexer(from_dict(ModelConfig, composed.value("model"), "model"))
    else:
        done = recipe.convert.converted is not None
    if done:
        return
    if "model" in composed.choices:
        raise ConfigError("model", f"comes from the checkpoint with recipe={recipe.name}",
                          got=composed.choices["model"],
                          hint=f"leave model=... out; {_source_key(composed)} says which checkpoint is converted")
    init_from = composed.value("init_from")
    source = None if init_from is None else str(init_from)
    if recipe.convert is not None and source is not None:
        model = _plan_conversion(composed)
        converted = [model.mixers[model.layers()[layer]] for layer in composed.value("recipe.convert.converted")]
        if any(mixer.selector_parameters() for mixer in converted):
            _require_warm_up(recipe, "a selector")
        composed.replace_model(to_dict(model if recipe.indexer is None else add_indexers(recipe, model)))
        return
    composed.replace_model(to_dict(convert_model(recipe, source)))


def _plan_conversion(composed: Composition) -> ModelConfig:
    """Write into the recipe which layers of the checkpoint `init_from` are converted; returns the converted model."""
    recipe = from_dict(RecipeConfig, composed.value("recipe"), "recipe", root=Config)
    length = composed.value("training.sequence_length")
    longest = recipe.longest_sequence(length if isinstance(length, int) else TrainingConfig().sequence_length)
    assert recipe.convert is not None
    key = _source_key(composed)
    source = _find_checkpoint(str(composed.value("init_from")), key)
    plan = plan_conversion(recipe.convert, checkpoint.read_model_config(source), key, longest)
    composed.set("recipe.convert.keep", plan.keep)
    composed.set("recipe.convert.converted", plan.converted)
    return plan.model


def _require_warm_up(recipe: RecipeConfig, selector: str) -> None:
    """Check that a dense stage comes first, for selectors that start from fresh weights.

    Raises:
        ConfigError: the first stage is sparse.
    """
    first = recipe.stages[0]
    if first.attention_mode != "dense":
        raise ConfigError("recipe.stages.0.attention_mode", f"would select keys by {selector} that nothing has trained",
                          got=first.attention_mode, expected="a dense stage first",
                          hint="or init_from a checkpoint that went through one")


def _take_tokenizer(composed: Composition, source: str, folder: Path) -> None:
    """Let the run use the tokenizer of a checkpoint, unless the command line or a file names another one.

    `bytes` is the default and `bpe` trains a tokenizer of its own: weights that exist fit neither by chance.

    Args:
        composed: the run.
        source: the checkpoint or run folder as the person named it.
        folder: the checkpoint in it.
    """
    named = composed.value("data.tokenizer") not in (None, "bytes", "bpe")
    if named or composed.overrides("data.tokenizer") or not (folder / "tokenizer.json").is_file():
        return
    is_bytes = checkpoint.load_tokenizer(folder).is_bytes
    composed.set("data.tokenizer", "bytes" if is_bytes else source)


def _find_checkpoint(source: str, key: str) -> Path:
    """The checkpoint that `init_from` or `branch_from` names; its files are not read.

    Raises:
        ConfigError: there is nothing at this path.
        CheckpointError: what is there cannot be used.
    """
    if not Path(source).expanduser().exists():
        raise ConfigError(key, "no such checkpoint", got=source, expected="a run folder or a checkpoint folder",
                          hint=did_you_mean_path(source))
    return checkpoint.resolve(source, hashes=False)


def load_data_config(name: str = "train", overrides: Sequence[str] = (),
                     config_dir: str | Path | None = None) -> DataConfig:
    """Compose and check the data section of a run, as a run would read it; its model need not fit it.

    Args:
        name, overrides, config_dir: as in `load_config`.

    Raises:
        ConfigError: anything wrong with a name, a key, or a value of the data section.
        CheckpointError: the checkpoint that the run starts from, and takes its tokenizer from, cannot be used.

    Example:
        >>> load_data_config("train", ["data.path=texts/", "data.tokenizer=bpe", "data.tokenizer_vocab_size=8192"]).path
        'texts/'
    """
    overrides = [str(override) for override in overrides]
    starts_from = override_value(overrides, "branch_from") or _started_run(name, overrides)
    composed = None if starts_from else compose_run(name, overrides, config_dir)
    if composed is None or composed.has("init_from"):
        return load_config(name, overrides, config_dir).data
    return composed.finish_data()


def load_model_config(model: str | Path, overrides: Sequence[str] = (),
                      config_dir: str | Path | None = None) -> ModelConfig:
    """Compose and check the config of a model alone.

    Args:
        model: a built-in name or a YAML file.
        overrides: those of the command line; they start with "model.".
        config_dir: a folder of your own configs, searched before the built-in one.

    Raises:
        ConfigError: anything wrong with a name, a key or a value.

    Example:
        >>> load_model_config("hybrid_tiny", ["model.schedule.ratio=1"]).layers()
        ['kda', 'full', 'kda', 'full']
    """
    return load_config("train", [f"model={quote(str(model))}", *overrides], config_dir).model


def convert_model(recipe: RecipeConfig, init_from: str | None) -> ModelConfig:
    """The checkpoint's model with the indexer of `recipe.indexer` in `recipe.layers`; nothing is allocated.

    Layers that have an indexer keep it, with its own options. Index queries and keys rotate where the layer's own do.
    With `share: n` in the indexer's options, every n-th converted layer gets an indexer, and those between read its
    selection.

    Args:
        recipe: one with an indexer.
        init_from: the run or checkpoint folder that the run starts from; None where none is named.

    Raises:
        ConfigError: no checkpoint is named, it has no layer to convert, or a stage would select keys by an indexer
            that nothing has trained.
        CheckpointError: the checkpoint cannot be used.
    """
    if init_from is None:
        raise ConfigError("init_from", "is missing", expected=f"the checkpoint that recipe={recipe.name} converts")
    return add_indexers(recipe, checkpoint.read_model_config(_find_checkpoint(init_from, "init_from")))


def add_indexers(recipe: RecipeConfig, config: ModelConfig) -> ModelConfig:
    """The model with the indexer of `recipe.indexer` in `recipe.layers`, as `convert_model` puts it there.

    Raises:
        ConfigError: as `convert_model`.
    """
    layers = layers_to_convert(config, recipe.layers)
    if not layers:
        return config
    _require_warm_up(recipe, "an indexer")
    options = dict(recipe.indexer or {})
    share = options.pop("share", 1)
    if not isinstance(share, int) or isinstance(share, bool) or share < 1:
        raise ConfigError("recipe.indexer.share", "is how many converted layers read one indexer's selection",
                          got=share, expected="1 (each has its own), 2, 3, ...")
    readers = [layer for position, layer in enumerate(layers) if position % share]
    try:
        indexer = fit_indexer(options, config, layers, "indexer", config.max_position)
        _check_one_topk(recipe, config, indexer.topk)
        model = add_indexer(build_model(config, device="meta"), indexer, layers[::share])[0]
        if readers:
            model = add_indexer(model, dataclasses.replace(indexer, share=True), readers)[0]
    except ConfigError as error:
        if error.key.startswith("recipe."):
            raise
        inside = error.key.partition("indexer.")[2]
        raise ConfigError(f"recipe.indexer.{inside}" if inside else f"recipe.layers: {error.key}", error.what,
                          got=error.got, expected=error.expected, hint=error.hint) from None
    model.config.name = f"{config.name or 'model'}_dsa"
    return model.config


def _check_one_topk(recipe: RecipeConfig, config: ModelConfig, fresh: int) -> None:
    """Check that fresh indexers select as many keys as those that the checkpoint has, where no stage says how many.

    Raises:
        ConfigError: they differ.
    """
    names = config.layers()
    topks = {index: config.mixers[name].indexer_topk() for index, name in enumerate(names)}
    there = {index: topk for index, topk in topks.items() if topk is not None}
    left_open = [index for index, stage in enumerate(recipe.stages)
                 if stage.attention_mode != "dense" and stage.topk is None]
    if left_open and set(there.values()) - {fresh}:
        index, topk = next((index, topk) for index, topk in there.items() if topk != fresh)
        raise ConfigError("recipe.indexer.topk", f"is not that of the indexer which layer {index} has already",
                          got=fresh, expected=f"{topk}, as there",
                          hint=f"recipe.stages.{left_open[0]}.topk=N sets one for all layers of a stage")


def layers_to_convert(config: ModelConfig, wanted: Sequence[int] | None) -> list[int]:
    """Indices of the layers that are to get an indexer; those that have one are left out.

    Args:
        config: the model of the checkpoint.
        wanted: the layers to convert, negative ones from the end; None for all softmax layers that see every token.

    Raises:
        ConfigError: there is no such layer, or a wanted one cannot take an indexer.
    """
    convertible: list[int] = []
    indexed: list[int] = []
    names = config.layers()
    for index, name in enumerate(names):
        mixer = config.mixers[name]
        if mixer.has_indexer():
            indexed.append(index)
        elif mixer.can_take_indexer():
            convertible.append(index)
    if wanted is None:
        if not convertible and not indexed:
            kinds = sorted({f"{name} ({config.mixers[name].kind})" for name in names})
            raise ConfigError("init_from", "holds a model without full attention: there is nothing to convert",
                              got=", ".join(kinds), expected="layers of kind attention (without a window) or mla")
        return convertible
    for index in wanted:
        if not -len(names) <= index < len(names):
            raise ConfigError("recipe.layers", "names a layer the model does not have", got=index,
                              expected=f"0 to {len(names) - 1}")
    chosen = sorted({index % len(names) for index in wanted})
    wrong = [index for index in chosen if index not in convertible and index not in indexed]
    if wrong or not chosen:
        raise ConfigError("recipe.layers", "names a layer that is not full attention" if wrong else "names no layer",
                          got=f"{wrong[0]} ({names[wrong[0]]})" if wrong else list(wanted),
                          expected=f"some of {sorted([*convertible, *indexed])}")
    return [index for index in chosen if index in convertible]
