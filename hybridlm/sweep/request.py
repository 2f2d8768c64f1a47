"""Reads the request for a sweep: a file of configs/sweep/ and the words of the command line, which take precedence."""

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

from hybridlm.config.paths import config_dir as built_in_configs
from hybridlm.config.paths import options
from hybridlm.config.plain_yaml import Loader
from hybridlm.config.schema import Config
from hybridlm.config.serialization import from_dict, hint_at, load_yaml, to_dict
from hybridlm.errors import ConfigError, did_you_mean, require
from hybridlm.sweep.probe_tasks import ProbeTask, read_tasks

Budget = Literal["none", "params", "active", "flops", "state"]
Launcher = Literal["local", "slurm", "ray"]


@dataclass(kw_only=True)
class SweepConfig:
    """A sweep's own settings. Its points are the product of the lists in `vary`.

    >>> SweepConfig(name="ratios", vary={"model.schedule.ratio": [0, 1]}).folder.as_posix()
    'runs/sweeps/ratios'
    """

    name: str = "custom"
    overrides: list[str] = field(default_factory=list)  # settings of every point, key=value
    vary: dict[str, list[Any]] = field(default_factory=dict)  # the values of each key of `hybridlm train` to vary
    match: Budget = "none"  # the budget that all points share with the reference
    reference: str | None = None  # name of the reference point; null: the first
    state_context: int = 32768  # tokens of context at which decode state is matched
    metrics: list[str] | None = None  # metrics that the results keep; null: all
    dir: str | None = None  # where everything goes; null: runs/sweeps/NAME
    probes: list[ProbeTask] = field(default_factory=list)  # every point is trained on each, with fresh weights
    language_model: bool = True  # false: no training on text, probes alone
    launcher: Launcher = "local"  # what runs the points
    slurm: dict[str, Any] = field(default_factory=dict)  # options of the launcher of that name
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
        """The options of the chosen launcher."""
        return {"local": {}, "slurm": self.slurm, "ray": self.ray}[self.launcher]

    @property
    def folder(self) -> Path:
        """The folder that the sweep writes to."""
        return Path(self.dir).expanduser() if self.dir else Path("runs") / "sweeps" / self.name


@dataclass(kw_only=True)
class Request:
    """A command line, read.

    Attributes:
        sweep: the sweep's own settings.
        root: the config that every point starts from: a name or a file.
        fixed: overrides of every point.
        vary: the values of each varied key, as text.
        config_dir: a folder of the user's own config groups.
    """

    sweep: SweepConfig
    root: str
    fixed: list[str]
    vary: dict[str, list[str]]
    config_dir: str | None = None


def read_request(words: Sequence[str], config_dir: str | None = None) -> Request:
    """The request of a command line `[CONFIG] sweep=NAME sweep.KEY=VALUE KEY=VALUE KEY=V1,V2,...`.

    Raises:
        ConfigError: a sweep that does not exist, an unknown key of `sweep`, an empty list.

    >>> request = read_request(["model=hybrid_tiny", "training.seed=0,1", "sweep.match=params"])
    >>> request.fixed, request.vary, request.sweep.match
    (['model=hybrid_tiny'], {'training.seed': ['0', '1']}, 'params')
    """
    words = list(words)
    root = "train"
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
            own[key.removeprefix("sweep.")] = _parse_sweep_value(key, text)
        elif values := _split_list(key, word, text):
            lists[key] = values
            fixed.pop(key, None)
        else:
            fixed[key] = word
            lists.pop(key, None)
    asked = read_plan_file("sweep", file, config_dir, required="vary") if file is not None else {}
    for key, value in own.items():
        set_value(asked, key, value)
    asked["probes"] = [to_dict(task) for task in read_tasks(asked.get("probes", []))]
    sweep = from_dict(SweepConfig, asked, "sweep")
    vary = {key: [to_override_text(value) for value in values] for key, values in sweep.vary.items()
            if key not in fixed}
    base = {word.partition("=")[0].lstrip("+"): word for word in sweep.overrides}
    return Request(sweep=sweep, root=root, fixed=list({**base, **fixed}.values()), vary={**vary, **lists},
                   config_dir=config_dir)


def _split_list(key: str, word: str, text: str) -> list[str]:
    """The values of a list `a,b,c`, `range(...)` or `choice(...)`; none for a word with one value."""
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
    if not values and (override.is_sweep_override() or (override.value() == [] and not _is_list_key(key))):
        raise ConfigError(key, "is an empty list", got=text, expected="values between commas, such as 0,1,3")
    return values


def _is_list_key(key: str) -> bool:
    """Whether a list is one value of this key."""
    return get_origin(hint_at(Config, key)) in (list, tuple)


def set_value(asked: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of the settings of a sweep; those of launchers may have several parts, such as `slurm.partition`.

    Args:
        asked: the settings, which are changed.
        key: without the `sweep.` in front.
        value: the value.

    Raises:
        ConfigError: an option of a launcher below another one that has a value.

    >>> settings = {}
    >>> set_value(settings, "slurm.setup.first", 1)
    >>> settings
    {'slurm': {'setup': {'first': 1}}}
    """
    launcher, _, option = key.partition(".")
    if launcher in ("slurm", "ray") and option and isinstance(asked.setdefault(launcher, {}), dict):
        *parents, last = option.split(".")
        options = asked[launcher]
        for parent in parents:
            options = options.setdefault(parent, {})
            if not isinstance(options, dict):
                raise ConfigError(f"sweep.{key}", f"'{parent}' has no keys", got=value)
        options[last] = value
    else:
        asked[key] = value


def _parse_sweep_value(key: str, text: str) -> Any:
    """The value of a key of the sweep itself, sweep.KEY=TEXT."""
    if key == "sweep.dir":
        return text or None
    if text.strip() == "":
        raise ConfigError(key, "has no value")
    if key == "sweep.probes":
        return parse_probes(text)
    if key == "sweep.metrics":
        return None if text == "null" else [name for name in re.split(r"[,\[\]\s]+", text) if name]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_probes(text: str, key: str = "sweep.probes") -> Any:
    """Names such as mqar,s5 or a YAML list such as [{name: mqar, steps: 500}, s5]."""
    if not text.lstrip().startswith("["):
        return [name for name in re.split(r"[,\s]+", text) if name]
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        raise ConfigError(key, "cannot be read", got=text, expected="mqar,s5 or a list such as "
                          "[{name: mqar, steps: 500}, s5]") from None


def read_plan_file(group: str, name: str, config_dir: str | None, *, required: str) -> dict[str, Any]:
    """The content of the file of a sweep or ladder, with the file's name as `name` where it has no other.

    Args:
        group: sweep or ladder.
        name: its name in the group, or its path.
        config_dir: a folder of the user's own config groups.
        required: a key that every such file has; the error of a file that is no mapping names it.

    Raises:
        ConfigError: there is no such file, or it is no mapping.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    else:
        folders = [Path(config_dir).expanduser()] if config_dir else []
        found = [folder / group / f"{name}.yaml" for folder in [*folders, built_in_configs()]]
        known = options(group, config_dir)
        if name not in known:
            raise ConfigError(group, f"no such {group}", got=name,
                              expected=f"one of {', '.join(known)}, or a YAML file", hint=did_you_mean(name, known))
        path = next(file for file in found if file.is_file())
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(group, f"is not a {group}", got=str(path), expected=f"a mapping with the key '{required}'")
    return {"name": re.sub(r"[^\w.-]", "_", path.stem), **data}


def to_override_text(value: Any) -> str:
    """A value of a sweep's file as one would type it on the command line.

    >>> to_override_text(float("inf")), to_override_text([1, 2])
    ('inf', '[1, 2]')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value)


def to_table_value(text: str) -> Any:
    """A value for tables and JSON: a finite number as a number, everything else as text.

    >>> to_table_value("3"), to_table_value("inf")
    (3, 'inf')
    """
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text
