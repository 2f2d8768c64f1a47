"""What a sweep is asked to do: a file of configs/sweep/, and the words of the command line, which win."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hybridlm.config.paths import config_dir as built_in
from hybridlm.config.paths import options
from hybridlm.config.plain_yaml import Loader
from hybridlm.config.schema import Config
from hybridlm.config.serialization import from_dict, hint_at, load_yaml, to_dict
from hybridlm.errors import ConfigError, did_you_mean, require
from hybridlm.sweep.probes import ProbeTask, read_tasks

Match = Literal["none", "params", "flops", "state"]
Launcher = Literal["local", "slurm", "ray"]


@dataclass(kw_only=True)
class SweepConfig:
    """A sweep. Points are the product of the lists in `vary`, each key a setting of `hybridlm train`.

    `overrides` are settings of every point. `match` is the budget that all points share with the `reference` (a
    point's name; null: the first). `state_context` is where decode state is matched. `metrics` (null: all) are
    those the results keep. `dir` (null: runs/sweeps/NAME) is where everything goes. Every point is trained on the
    `probes` besides, each with fresh weights; without `language_model` on nothing else. `launcher` is what runs the
    points, with its own options in `slurm` or `ray`.
    """

    name: str = "custom"
    overrides: list[str] = field(default_factory=list)
    vary: dict[str, list[Any]] = field(default_factory=dict)
    match: Match = "none"
    reference: str | None = None
    state_context: int = 32768
    metrics: list[str] | None = None
    dir: str | None = None
    probes: list[ProbeTask] = field(default_factory=list)
    language_model: bool = True
    launcher: Launcher = "local"
    slurm: dict[str, Any] = field(default_factory=dict)
    ray: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(re.fullmatch(r"[\w.-]+", self.name) is not None, "name", "cannot name a folder", got=self.name,
                expected="letters, digits, '_', '-' and '.'")
        require(self.state_context > 0, "state_context", "must be positive", got=self.state_context)
        require(self.language_model or bool(self.probes), "language_model", "is off, and there are no probes",
                expected="sweep.probes=mqar,s5, or sweep.language_model=true")
        for key, values in self.vary.items():
            require(len(values) > 0, f"vary.{key}", "is an empty list", expected="at least one value")

    @property
    def launcher_options(self) -> dict[str, Any]:
        return {"local": {}, "slurm": self.slurm, "ray": self.ray}[self.launcher]

    @property
    def folder(self) -> Path:
        return Path(self.dir).expanduser() if self.dir else Path("runs") / "sweeps" / self.name


@dataclass(kw_only=True)
class Request:
    """`root` is the whole config that points start from; `vary` holds override texts by key."""

    sweep: SweepConfig
    root: str
    fixed: list[str]
    vary: dict[str, list[str]]
    config_dir: str | None = None


def read_request(words: Sequence[str], config_dir: str | None = None) -> Request:
    """The request of a command line: `[CONFIG] sweep=NAME sweep.KEY=VALUE KEY=VALUE KEY=V1,V2,...`.

    Raises:
        ConfigError: a sweep that does not exist, an unknown key of `sweep`, an empty list.
    """
    words, root = list(words), "train"
    if words and ("=" not in words[0] or Path(words[0]).is_file()) and not words[0].startswith("~"):
        root = words.pop(0)
    own: dict[str, Any] = {}
    fixed: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    file: str | None = None
    for word in words:
        key, _, text = word.partition("=")
        key = key.removeprefix("++").removeprefix("+")
        if key == "sweep" and "=" in word:
            file = text
        elif key.startswith("sweep."):
            own[key.removeprefix("sweep.")] = _own_value(key, text)
        elif values := _values(key, word, text):
            lists[key] = values
            fixed.pop(key, None)
        else:
            fixed[key] = word
            lists.pop(key, None)
    asked = _read_file(file, config_dir) if file is not None else {}
    for key, value in own.items():
        _set(asked, key, value)
    asked["probes"] = [to_dict(task) for task in read_tasks(asked.get("probes", []))]
    sweep = from_dict(SweepConfig, asked, "sweep")
    vary = {key: [as_text(value) for value in values] for key, values in sweep.vary.items() if key not in fixed}
    base = {word.partition("=")[0].lstrip("+"): word for word in sweep.overrides}
    return Request(sweep=sweep, root=root, fixed=list({**base, **fixed}.values()), vary={**vary, **lists},
                   config_dir=config_dir)


def _values(key: str, word: str, text: str) -> list[str]:
    """The values of a list `a,b,c`, `range(...)` or `choice(...)`; empty for a word with one value."""
    stripped = text.strip()
    if "=" in word and (stripped in ("", "choice()", "range()") or re.search(r"^,|,\s*,|,$", stripped)):
        raise ConfigError(key, "has an empty value in its list" if "," in stripped else "is an empty list", got=text,
                          expected="values between commas, such as 0,1,3")
    try:
        override = OverridesParser.create().parse_overrides([word])[0]
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
    except HydraException as error:
        if re.match(r"(interval|glob|tag)\(", stripped):
            raise ConfigError(key, "cannot be listed", got=text, expected="a,b,c, choice(...) or range(...)") from error
        return []  # text that Hydra's grammar does not know: load_config takes it, or says what is wrong
    if not values and (override.is_sweep_override() or (override.value() == [] and not _takes_list(key))):
        raise ConfigError(key, "is an empty list", got=text, expected="values between commas, such as 0,1,3")
    return values


def _takes_list(key: str) -> bool:
    """Is a list one value of this key?"""
    return get_origin(hint_at(Config, key)) in (list, tuple)


def _set(asked: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of the sweep; launchers have options of their own, `slurm.partition`."""
    first, _, rest = key.partition(".")
    if first in ("slurm", "ray") and rest and isinstance(asked.setdefault(first, {}), dict):
        *outer, last = rest.split(".")
        inner = asked[first]
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    else:
        asked[key] = value


def _own_value(key: str, text: str) -> Any:
    """Value of a key of the sweep itself."""
    if key == "sweep.dir":
        return text or None
    if text.strip() == "":
        raise ConfigError(key, "has no value")
    if key == "sweep.probes":
        return _own_probes(text)
    if key == "sweep.metrics":
        return None if text == "null" else [name for name in re.split(r"[,\[\]\s]+", text) if name]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _own_probes(text: str) -> Any:
    """mqar,s5 or, where there is more to say, [{name: mqar, steps: 500}, s5]."""
    if not text.lstrip().startswith("["):
        return [name for name in re.split(r"[,\s]+", text) if name]
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        raise ConfigError("sweep.probes", "cannot be read", got=text, expected="mqar,s5 or a list such as "
                          "[{name: mqar, steps: 500}, s5]") from None


def _read_file(name: str, config_dir: str | None) -> dict[str, Any]:
    """A sweep's file, by its name in a group `sweep` or by its path."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    else:
        folders = [Path(config_dir).expanduser()] if config_dir else []
        found = [folder / "sweep" / f"{name}.yaml" for folder in [*folders, built_in()]]
        known = options("sweep", config_dir)
        if name not in known:
            raise ConfigError("sweep", "no such sweep", got=name, expected=f"one of {', '.join(known)}, or a YAML file",
                              hint=did_you_mean(name, known))
        path = next(file for file in found if file.is_file())
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError("sweep", "is not a sweep", got=str(path), expected="a mapping with the key 'vary'")
    return {"name": re.sub(r"[^\w.-]", "_", path.stem), **data}


def as_text(value: Any) -> str:
    """A value of a sweep's file as the command line would have it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value)


def as_value(text: str) -> Any:
    """A value for tables and JSON: whole numbers and finite ones as such, all else as text."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text
