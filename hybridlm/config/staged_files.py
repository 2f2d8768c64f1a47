"""The folder in which Hydra finds a person's own files: they are copied there under names that no built-in option has.

Hydra finds a root config only in the first folder it searches, and that is this one. The config of a whole run that a
person chooses for one group (`model=runs/first/config.yaml`) stands for its part of that group. A saved config as the
root is split into its groups, so that overrides can choose another option of each (`optimizer=muon`).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from hybridlm.config.legacy import is_saved_config, upgrade_config
from hybridlm.config.serialization import load_yaml, to_yaml
from hybridlm.errors import ConfigError, did_you_mean, did_you_mean_path

ROOT_GROUPS = ("model", "data", "optimizer", "recipe", "engine", "experiment")
YAML_ENDINGS = (".yaml", ".yml")
STAGED = "file_"  # prefix of the names that users' files get where Hydra finds them
SAVED_OPTION = f"{STAGED}saved"  # name of the options that the sections of a saved config become


def stage_root(name: str, folders: list[Path], stage: Path) -> tuple[str, list[str]]:
    """Put the root config into `stage`; return its name there and the overrides that `name` stands for.

    Raises:
        ConfigError: no config of this name.
    """
    if name.endswith(YAML_ENDINGS):
        path = existing_file(name, "")
        data = load_yaml(path)
        if is_saved_config(data):
            _split_saved(upgrade_config(data), stage)
        else:
            shutil.copyfile(path, stage / f"{STAGED}root.yaml")
        return f"{STAGED}root", []
    chosen: list[str] = []
    if not any((folder / f"{name}.yaml").is_file() for folder in folders):
        group = next((g for g in ("experiment", "model")
                      for folder in folders if (folder / g / f"{name}.yaml").is_file()), None)
        if group is None and "/" in name:
            raise ConfigError("", "no such file or folder" if not Path(name).expanduser().exists() else
                              "is a folder without a run", got=name, expected="a run folder, a YAML file or a name",
                              hint=did_you_mean_path(name))
        if group is None:
            known = sorted({p.stem for folder in folders for g in (".", "experiment", "model")
                            for p in (folder / g).glob("*.yaml")})
            raise ConfigError("", "no config of this name", got=name, expected=f"one of {', '.join(known)}",
                              hint=did_you_mean(name, known))
        name, chosen = "train", [f"{group}={name}"]
    source = next(folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file())
    shutil.copyfile(source, stage / f"{name}.yaml")
    return name, chosen


def _split_saved(data: dict[str, Any], stage: Path) -> None:
    """Put a saved config into `stage`, each section as an option of its group: overrides can choose another one."""
    rest, chosen = dict(data), []
    for group in ROOT_GROUPS[:-1]:
        section = rest.pop(group, None)
        if isinstance(section, dict):
            (stage / group).mkdir(exist_ok=True)
            (stage / group / f"{SAVED_OPTION}.yaml").write_text(to_yaml(section), encoding="utf-8")
        chosen.append({group: SAVED_OPTION if isinstance(section, dict) else None})
    root = {"defaults": [*chosen, "_self_", {"experiment": None}], **rest}
    (stage / f"{STAGED}root.yaml").write_text(to_yaml(root), encoding="utf-8")


def existing_file(text: str, key: str) -> Path:
    """The absolute path of a file that a person named.

    Raises:
        ConfigError: there is no such file; `key` is the key that named it.
    """
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(key, "no such file", got=text, expected="a YAML file", hint=did_you_mean_path(path))
    return path


def stage_file(path: Path, group: str, stage: Path) -> str:
    """Copy a user's file into the staged group, under a name that no built-in option has, and return that name.

    The config of a whole run (a checkpoint's config.yaml) stands for its part of that group.
    """
    option = STAGED + re.sub(r"[^\w-]", "_", path.stem)
    target = stage / group / f"{option}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    _copy(path, target, group)
    return option


def _copy(path: Path, target: Path, group: str) -> None:
    """Copy a user's file, or only its section `group` where it is a whole run; a saved config is upgraded."""
    data = load_yaml(path)
    if data is None:
        raise ConfigError(group, "this file is empty", got=str(path), expected="settings in YAML")
    saved = is_saved_config(data)
    if saved:
        data = upgrade_config(data)
    section = data.get(group) if isinstance(data, dict) and "defaults" not in data else None
    if isinstance(section, dict):
        target.write_text(to_yaml(section), encoding="utf-8")
    elif saved:
        target.write_text(to_yaml(data), encoding="utf-8")
    else:
        shutil.copyfile(path, target)
