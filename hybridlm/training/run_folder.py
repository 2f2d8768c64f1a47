"""The folder of a run: its files, its lock, and the check whether a config may resume it.

    run_dir/
      config.yaml      the resolved config
      deepspeed.json   the settings of DeepSpeed, where the engine uses it
      run.json         every session: command, versions, device
      metrics.jsonl    one JSON object per step
      backends.json    which kernel backend ran each operation in each layer, and why
      log.txt          the printed lines, with times
      samples-0.jsonl  which samples rank 0 computed in each step, where it was asked for
      checkpoints/     step-N/
"""

from __future__ import annotations

import contextlib
import json
import platform
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybridlm import checkpoint
from hybridlm.config.legacy import load_saved_config
from hybridlm.config.schema import Config
from hybridlm.config.serialization import from_dict, to_dict, to_yaml
from hybridlm.distributed.communicator import SINGLE_PROCESS, Communicator
from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.files import Lock, try_lock, write_text
from hybridlm.model.config import ModelConfig
from hybridlm.version import __version__

# Keys that may change when a run is resumed: its length, how it is run and watched; not the model, the data or the
# hyperparameters.
CHANGEABLE_KEYS = (
    "run_dir", "model.name", "model.published", "engine", "tracking", "kernels", "data.cache_dir", "training.steps",
    "training.tokens", "training.precision", "training.micro_batch_size", "training.activation_checkpointing",
    "training.log_every", "training.eval_every", "training.eval_batches", "training.checkpoint_every",
    "training.keep_checkpoints", "training.async_checkpoint", "training.resume", "training.max_bad_steps",
    "training.record_samples")
# Keys that say where data stands. It may move: a checkpoint keeps the fingerprint of its content.
PLACES_OF_DATA = ("data.path", "data.mixture.*.path", "data.validation_path", "data.tokenizer")
NAMES_OF_DATA = ("stdlib", "bytes", "bpe")  # values of those keys that are no place
MAX_NAMED_DIFFERENCES = 4  # in one error message
LOCK_FILE = ".lock"
CHANGEABLE_STAGE_KEYS = ("steps", "tokens", "eval_recall")


class RunFolder:
    """Locks the folder for one run until `close()`. Of several processes only the main one locks and writes it.

    Raises:
        ConfigError: another process trains here, or the folder cannot be written.
    """

    def __init__(self, path: str | Path, main: bool = True):
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.log_file = self.path / "log.txt"
        self._lock: Lock | None = None
        if not main:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = try_lock(self.path / LOCK_FILE)
        except OSError as error:
            raise ConfigError("run_dir", f"cannot be written ({error.strerror})", got=str(path)) from None
        if self._lock is None:
            raise ConfigError("run_dir", "another process is training here", got=str(path),
                              hint="wait for it, or take another run_dir")

    def samples_file(self, rank: int) -> Path:
        """Path of the file in which `training.record_samples` writes the samples of a rank."""
        return self.path / f"samples-{rank}.jsonl"

    def close(self) -> None:
        """Release the folder's lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def start_from(self, config: Config, ranks: Communicator = SINGLE_PROCESS) -> Path | None:
        """Find the checkpoint to resume from; None for a fresh start. All ranks call it together.

        Raises:
            CheckpointError: a changed architecture, damaged checkpoints alone, or none where one is required.
            ConfigError: the folder holds a run of another config, or one that must not be resumed.
        """
        ranks.on_main(lambda: self._check(config))
        found = checkpoint.newest(self.checkpoints, ranks)
        if found is None:
            ranks.on_main(lambda: self._check_fresh(config.training.resume))
        return found

    def _check(self, config: Config) -> None:
        used = self.config_file.exists() or bool(checkpoint.step_folders(self.checkpoints))
        if config.training.resume == "never" and used:
            raise ConfigError("run_dir", "already holds a run", got=str(self.path), expected="an empty folder",
                              hint="training.resume=auto goes on with it")
        if used and self.config_file.exists():
            check_same_run(load_saved_config(self.config_file), config, self.path)
        checkpoint.remove_drafts(self.checkpoints)

    def _check_fresh(self, resume: str) -> None:
        if checkpoint.step_folders(self.checkpoints):
            raise CheckpointError(f"every checkpoint in {self.checkpoints} is damaged; move them away to start "
                                  "again, or take another run_dir")
        if resume == "require":
            raise CheckpointError(f"no checkpoint in {self.checkpoints} and training.resume=require; "
                                  "training.resume=auto starts a new run")

    def begin_session(self, config: Config, facts: dict[str, Any], deepspeed: dict[str, Any] | None = None) -> None:
        """Write config.yaml and deepspeed.json, and add this session to run.json.

        Raises:
            ConfigError: the folder cannot be written.
        """
        sessions = self.sessions()
        sessions.append({"started": datetime.now(UTC).isoformat(timespec="seconds"), **facts})
        try:
            write_text(self.config_file, to_yaml(config))
            if deepspeed is not None:
                write_text(self.path / "deepspeed.json", json.dumps(deepspeed, indent=1))
            write_text(self.path / "run.json", json.dumps({"sessions": sessions}, indent=1))
        except OSError as error:
            raise ConfigError("run_dir", f"cannot be written ({error.strerror})", got=str(self.path)) from None

    def sessions(self) -> list[dict[str, Any]]:
        """Read the sessions of the run, oldest first."""
        return read_sessions(self.path)


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """Read the sessions of a run, oldest first; none where run.json is missing or cannot be read."""
    try:
        return list(json.loads((folder / "run.json").read_text(encoding="utf-8"))["sessions"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def versions() -> dict[str, str]:
    """Collect the versions of the packages that decide a run's numbers."""
    import accelerate
    import torch

    found = {"python": platform.python_version(), "hybridlm": __version__, "torch": torch.__version__,
             "accelerate": accelerate.__version__, "platform": platform.platform()}
    for package in ("triton", "deepspeed"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def check_same_run(saved: Any, config: Config, where: Path) -> None:
    """Check that a run with the saved config may be resumed with this one.

    Raises:
        CheckpointError: the architecture has changed; the differences are in the text.
        ConfigError: something else has that makes it a different run.
    """
    with contextlib.suppress(ConfigError):  # keys that came into the schema since then have their defaults
        saved = to_dict(from_dict(Config, saved))
    old, new = flatten(saved), flatten(to_dict(config))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)
                     and not _may_change(key) and not _may_have_moved(key, old.get(key), new.get(key)))
    if any(key.startswith("model.") for key in changed):
        differ = _layer_changes(saved, config) or [
            _describe_change(key, old, new) for key in changed if key.startswith("model.")]
        raise CheckpointError(f"the model of the run in {where} has changed: {_join_differences(differ)}. Take another "
                              "run_dir, or the model that the run began with")
    if changed := [key for key in changed if not key.startswith("model.")]:
        differ = [_describe_change(key, old, new) for key in changed]
        raise ConfigError("run_dir", f"holds a different run: {_join_differences(differ)}", got=str(where),
                          hint="take another run_dir, or the config that the run began with")


def _join_differences(differences: list[str]) -> str:
    more = len(differences) - MAX_NAMED_DIFFERENCES
    return "; ".join(differences[:MAX_NAMED_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _layer_changes(saved: Any, config: Config) -> list[str]:
    try:
        before = checkpoint.layer_list(from_dict(ModelConfig, saved["model"], "model"))
    except (ConfigError, KeyError, TypeError):
        return []
    return checkpoint.layer_diff(before, checkpoint.layer_list(config.model))


def _describe_change(key: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    return f"{key} {old.get(key, 'not set')!r} -> {new.get(key, 'not set')!r}"


def _may_change(key: str) -> bool:
    if key.startswith("recipe.stages."):
        return key.rsplit(".", 1)[-1] in CHANGEABLE_STAGE_KEYS
    return any(key == changeable or key.startswith(f"{changeable}.") for changeable in CHANGEABLE_KEYS)


def _may_have_moved(key: str, old: Any, new: Any) -> bool:
    """Whether a difference is that of where data stands; its content is compared when a checkpoint is resumed."""
    return (any(fnmatchcase(key, pattern) for pattern in PLACES_OF_DATA)
            and not any(value is None or value in NAMES_OF_DATA for value in (old, new)))


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
