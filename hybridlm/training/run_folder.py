"""The folder of a run: its files, its lock, and the check whether a config may resume it.

    run_dir/
      config.yaml      the resolved config
      deepspeed.json   the settings of DeepSpeed, where the engine uses it
      run.json         every session: command, versions, device
      metrics.jsonl    one JSON object per step
      backends.json    which kernel backend ran each operation in each layer, and why
      log.txt          the printed lines, with times
      samples-0.jsonl  which samples rank 0 computed in each step, where it was asked for
      lineage.json     the checkpoint that the run began from, and those before it
      checkpoints/     step-N/
      earlier-N/       the log and metrics of an attempt that ended before its first checkpoint
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybridlm import checkpoint
from hybridlm.config.legacy import load_saved_config
from hybridlm.config.schema import Config
from hybridlm.config.serialization import to_yaml
from hybridlm.distributed.communicator import SINGLE_PROCESS, Communicator
from hybridlm.errors import CheckpointError, ConfigError, UserError
from hybridlm.files import Lock, try_lock, write_text
from hybridlm.training.run_changes import branch_command, check_same_run
from hybridlm.version import __version__

LOCK_FILE = ".lock"
KEPT_ASIDE = ("config.yaml", "run.json", "metrics.jsonl", "log.txt", "backends.json", "deepspeed.json", "lineage.json",
              "samples-*.jsonl")  # of an attempt that left no checkpoint, when another one begins


class RunFolder:
    """Locks the folder for one run until `close()`. Of several processes only the main one locks and writes it.

    `previous`: plain data of the config that the run has had so far, after `start_from`; None for a new run.
    `kept_aside`: where `set_aside` has put the files of an earlier attempt.

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
        self.previous: Any = None
        self.kept_aside: Path | None = None
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

    def set_aside(self, config: Config) -> None:
        """Make room for a run where another one ended before its first checkpoint: its files go to `earlier-N`.

        Nothing of such a run can be resumed, so it binds nobody to its settings. The same run again keeps its files.
        """
        if self._lock is None or checkpoint.step_folders(self.checkpoints) or not self.config_file.exists():
            return
        try:
            check_same_run(load_saved_config(self.config_file), config, self.path)
            if config.training.resume != "never":
                return
        except UserError:
            pass
        number = 1
        while (self.path / f"earlier-{number}").exists():
            number += 1
        target = self.path / f"earlier-{number}"
        try:
            target.mkdir()
            for file in sorted(file for pattern in KEPT_ASIDE for file in self.path.glob(pattern)):
                file.rename(target / file.name)
        except OSError as error:
            raise ConfigError("run_dir", f"cannot be written ({error.strerror})", got=str(self.path)) from None
        self.kept_aside = target

    def start_from(self, config: Config, ranks: Communicator = SINGLE_PROCESS,
                   command: Sequence[str] | None = None) -> Path | None:
        """Find the checkpoint to resume from; None for a fresh start. All ranks call it together.

        Args:
            config: of the run.
            ranks: the processes.
            command: the words that started the run, for the command of a branch.

        Raises:
            CheckpointError: a changed architecture, damaged checkpoints alone, or none where one is required.
            ConfigError: the folder holds a run of another config, or one that must not be resumed.
        """
        self.previous = ranks.on_main(lambda: self._check(config, command))
        found = checkpoint.newest(self.checkpoints, ranks)
        if found is None:
            ranks.on_main(lambda: self._check_fresh(config.training.resume))
        return found

    def _check(self, config: Config, command: Sequence[str] | None) -> Any:
        """Check the folder for `start_from`; return the config that the run has had so far, or None."""
        saved = check_folder(self.path, config, command)
        checkpoint.remove_drafts(self.checkpoints)
        return saved

    def _check_fresh(self, resume: str) -> None:
        if checkpoint.step_folders(self.checkpoints):
            raise CheckpointError(f"every checkpoint in {self.checkpoints} is damaged; move them away to start "
                                  "again, or take another run_dir")
        if resume == "require":
            raise CheckpointError(f"no checkpoint in {self.checkpoints} and training.resume=require; "
                                  "training.resume=auto starts a new run")

    def begin_session(self, config: Config, facts: dict[str, Any], deepspeed: dict[str, Any] | None = None,
                      lineage: str | None = None) -> None:
        """Write config.yaml, deepspeed.json and lineage.json, and add this session to run.json.

        Raises:
            ConfigError: the folder cannot be written.
        """
        sessions = self.sessions()
        sessions.append({"started": datetime.now(UTC).isoformat(timespec="seconds"), **facts})
        try:
            write_text(self.config_file, to_yaml(config))
            if deepspeed is not None:
                write_text(self.path / "deepspeed.json", json.dumps(deepspeed, indent=1))
            if lineage is not None:
                write_text(self.path / checkpoint.LINEAGE_FILE, lineage)
            write_text(self.path / "run.json", json.dumps({"sessions": sessions}, indent=1))
        except OSError as error:
            raise ConfigError("run_dir", f"cannot be written ({error.strerror})", got=str(self.path)) from None

    def sessions(self) -> list[dict[str, Any]]:
        """Read the sessions of the run, oldest first."""
        return read_sessions(self.path)


def check_folder(path: Path, config: Config, command: Sequence[str] | None) -> Any:
    """Check that a run may begin or go on in a folder, which is only read.

    Args:
        path: the folder, which need not be there.
        config: of the run.
        command: the words that started the run, for the command of a branch.

    Returns:
        Plain data of the config that the run there has had so far; None where there is none.

    Raises:
        CheckpointError: a changed architecture.
        ConfigError: the folder holds a run of another config, or one that must not be resumed.
    """
    file = path / "config.yaml"
    used = file.exists() or bool(checkpoint.step_folders(path / "checkpoints"))
    if config.training.resume == "never" and used:
        raise ConfigError("run_dir", "already holds a run", got=str(path), expected="an empty folder",
                          hint="training.resume=auto goes on with it")
    if not file.exists():
        return None
    saved = load_saved_config(file)
    asked = None if config.branch_from is None else Path(config.branch_from).expanduser()
    own = asked is not None and path.resolve() in asked.resolve().parents
    check_same_run(saved, config, path, branch_command(path, command, config, saved, source=asked if own else None))
    return saved


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
