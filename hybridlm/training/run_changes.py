"""Differences between the config that a run has had so far and the one it is given now."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from hybridlm import checkpoint
from hybridlm.config.compose import quote
from hybridlm.config.schema import Config
from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM
from hybridlm.user_code import import_arguments

# Keys that may change when a run is resumed: its length, how it is run and watched; not the model, the data or the
# hyperparameters.
CHANGEABLE_KEYS = (
    "run_dir", "model.name", "model.published", "engine", "tracking", "kernels", "data.cache_dir", "training.steps",
    "training.tokens", "training.precision", "training.micro_batch_size", "training.activation_checkpointing",
    "training.compile", "training.log_every", "training.eval_every", "training.eval_batches",
    "training.checkpoint_every", "training.keep_checkpoints", "training.async_checkpoint", "training.resume",
    "training.max_bad_steps", "training.record_samples")
# Keys that say where data stands. It may move: a checkpoint keeps the fingerprint of its content.
PLACES_OF_DATA = ("data.path", "data.mixture.*.path", "data.validation_path", "data.tokenizer")
NAMES_OF_DATA = ("stdlib", "bytes", "bpe")  # values of those keys that are no place
CHANGEABLE_STAGE_KEYS = ("steps", "tokens", "eval_recall")
MAX_NAMED_DIFFERENCES = 4  # in one error message
WORDS_OF_A_RUN = ("run_dir", "branch_from", "init_from", "training.resume")  # a branch has its own


@dataclass(frozen=True)
class Change:
    """A key of a run's config with its old and new value; None stands for a key that is not there, too."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {self.old!r} -> {self.new!r}"


def config_changes(saved: Any, config: Config) -> list[Change]:
    """List the keys whose values differ between a saved config and this one, sorted.

    Args:
        saved: plain data of a saved config. Keys that came into the schema since then have their defaults.
        config: the config now.
    """
    with contextlib.suppress(ConfigError):
        saved = to_dict(from_dict(Config, saved))
    old, new = flatten(saved), flatten(to_dict(config))
    return [Change(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)]


def check_same_run(saved: Any, config: Config, where: Path, branch: str = "") -> None:
    """Check that a run with the saved config may be resumed with this one.

    Args:
        saved: plain data of the saved config.
        config: the config now.
        where: the run folder.
        branch: the command that goes on from the run with the changes, in another folder.

    Raises:
        CheckpointError: the model's weights are others now; the differences are in the text.
        ConfigError: something else has changed that makes it a different run.
    """
    changed = [change for change in config_changes(saved, config)
               if not _may_change(change.key) and not _may_have_moved(change)]
    if not changed:
        return
    other_model = [change for change in changed if change.key.startswith("model.")]
    if other_model and (differ := weight_changes(saved, config)):
        raise CheckpointError(f"the model of the run in {where} has changed: {_join(differ)}. Take another run_dir, "
                              f"such as run_dir={free_folder(where)}, or the model that the run began with")
    # A branch converts nothing.
    converts = any(change.key.startswith(("recipe.convert.", "recipe.indexer.")) for change in changed)
    hint = f"to go on from it with these changes: {branch}" if branch and not converts else "take another run_dir"
    raise ConfigError("run_dir", f"holds a different run: {_join(changed)}", got=str(where),
                      hint=f"{hint}; or take the config that the run began with")


def weight_changes(saved: Any, config: Config) -> list[str]:
    """Describe why the weights of a saved run's model do not fit this one's: other layers, or shapes of weights.

    Args:
        saved: plain data of the saved run's config.
        config: the config now.

    Returns:
        One phrase per difference; empty where every weight has its place.
    """
    try:
        before = from_dict(ModelConfig, saved["model"], "model")
    except (ConfigError, KeyError, TypeError):
        return ["its config cannot be read"]
    layers = checkpoint.layer_diff(checkpoint.layer_list(before), checkpoint.layer_list(config.model))
    old, new = _shapes(before), _shapes(config.model)
    if layers or (old.keys() == new.keys() and old == new):
        return layers
    differ = [f"{key} {a!r} -> {b!r}" for key, a, b in _model_changes(before, config.model)]
    return differ or [f"'{sorted(old.keys() ^ new.keys())[0]}' is not in both"]


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in HybridLM(model).state_dict().items()}


def _model_changes(before: ModelConfig, after: ModelConfig) -> list[tuple[str, Any, Any]]:
    old, new = flatten(to_dict(before), "model"), flatten(to_dict(after), "model")
    return [(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not _may_change(key)]


def branch_command(run_dir: Path, command: Sequence[str] | None, config: Config, saved: Any = None,
                   more: Sequence[str] = (), source: Path | None = None) -> str:
    """Build the command that branches from a run into a folder beside it.

    Args:
        run_dir: the run's folder.
        command: the words that a person typed after `hybridlm train`; None: the changes are spelled out.
        config: the config now, for the changes.
        saved: plain data of the run's config.
        more: settings to add, which replace those of the same key.
        source: the checkpoint to branch from; None: the run's newest.

    Example:
        >>> branch_command(Path("runs/a"), ["model=quickstart", "optimizer.lr=1e-4"], None, more=["training.seed=1"])
        'hybridlm train model=quickstart optimizer.lr=1e-4 training.seed=1 branch_from=runs/a run_dir=runs/a-branch'
    """
    if command is None:
        changes = [] if saved is None else config_changes(saved, config)
        wanted = [c for c in changes if not _may_change(c.key) and c.key not in WORDS_OF_A_RUN]
        words = [*_settings(wanted, config), *import_arguments()]
    else:
        replaced = {*WORDS_OF_A_RUN, *(word.partition("=")[0] for word in more)}
        words = [word for word in command if word.lstrip("+").partition("=")[0] not in replaced]
    return shlex.join(["hybridlm", "train", *words, *more, f"branch_from={source or run_dir}",
                       f"run_dir={free_folder(run_dir)}"])


def free_folder(run_dir: Path) -> Path:
    """Find a name for a branch beside a run folder: `NAME-branch`, or with a number where that is there already."""
    for number in range(1, 1000):
        folder = run_dir.with_name(f"{run_dir.name}-branch{'' if number == 1 else f'-{number}'}")
        if not folder.exists():
            return folder
    return run_dir.with_name(f"{run_dir.name}-another-branch")


def _settings(changes: Sequence[Change], config: Config) -> list[str]:
    """Write changes as overrides of the command line; a list that holds one is written whole."""
    data = to_dict(config)
    settings = {}
    for change in changes:
        path: list[str] = []
        value: Any = data
        for part in change.key.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
            path.append(part)
        settings[".".join(path)] = value
    return [f"{key}={_hydra_value(value)}" for key, value in settings.items()]


def _hydra_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_hydra_value, value)) + "]"
    if isinstance(value, int | float) or value.replace("/", "").replace("_", "").isalnum():
        return str(value)
    return quote(value)


def _join(differences: Sequence[Any]) -> str:
    more = len(differences) - MAX_NAMED_DIFFERENCES
    return "; ".join(map(str, differences[:MAX_NAMED_DIFFERENCES])) + (f"; and {more} more" if more > 0 else "")


def _may_change(key: str) -> bool:
    if key.startswith("recipe.stages."):
        return key.rsplit(".", 1)[-1] in CHANGEABLE_STAGE_KEYS
    return any(key == changeable or key.startswith(f"{changeable}.") for changeable in CHANGEABLE_KEYS)


def _may_have_moved(change: Change) -> bool:
    """Whether a difference is that of where data stands; its content is compared when a checkpoint is resumed."""
    return (any(fnmatchcase(change.key, pattern) for pattern in PLACES_OF_DATA)
            and not any(value is None or value in NAMES_OF_DATA for value in (change.old, change.new)))


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested data to {dotted path: scalar}; empty containers count as values.

    >>> flatten({"a": {"b": 1, "c": [2, {}]}})
    {'a.b': 1, 'a.c.0': 2, 'a.c.1': {}}
    """
    if not value or not isinstance(value, dict | list):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        flat |= flatten(item, f"{path}.{key}" if path else str(key))
    return flat
