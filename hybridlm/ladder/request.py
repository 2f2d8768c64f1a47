"""Reads the request for a ladder: a file of configs/ladder/, and the words of the command line, which win."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hybridlm.config.plain_yaml import Loader
from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import ConfigError, did_you_mean, require
from hybridlm.ladder.rungs import RungConfig, find_rung
from hybridlm.model.parametrization import Kind
from hybridlm.sweep.probe_tasks import ProbeTask, read_tasks
from hybridlm.sweep.request import Budget, Launcher, parse_probes, read_plan_file, set_value, to_override_text

SCHEDULE_KEYS = ("linear", "full", "ratio", "pattern")  # of an architecture: short for model.schedule.KEY
LIST_KEYS = ("rungs", "seeds", "gate.rungs", "gate.project", "pilot.factors", "pilot.seeds")  # values between commas
EXTRAPOLATION_MAX = 100.0  # of a projection over the largest compute of a point


@dataclass(kw_only=True)
class FitConfig:
    """Options of the fit of laws.

    Args:
        form: `shared` asymptote and exponent, `pinned` asymptote, or `free` ones for every architecture.
        asymptote: value at which it is pinned, in bits per byte; null: fitted from five rungs on, else 0.
        bootstrap: number of repetitions for intervals.
    """

    form: Literal["shared", "pinned", "free"] = "shared"
    asymptote: float | None = None
    bootstrap: int = 2000

    def __post_init__(self) -> None:
        require(self.asymptote is None or self.asymptote >= 0, "asymptote", "must not be negative", got=self.asymptote)
        require(self.bootstrap >= 0, "bootstrap", "must not be negative", got=self.bootstrap)


@dataclass(kw_only=True)
class GateConfig:
    """Conditions under which an architecture passes.

    Args:
        rungs: names of the rungs that count; null: the two largest.
        level: probability of all intervals.
        project: amounts of compute, in FLOPs, to which laws are projected.
        extrapolate: allow projections beyond 100 times the largest compute.
    """

    rungs: list[str] | None = None
    level: float = 0.95
    project: list[float] = field(default_factory=list)
    extrapolate: bool = False

    def __post_init__(self) -> None:
        require(0 < self.level < 1, "level", "must be a probability", got=self.level, expected="above 0 and below 1")
        for compute in self.project:
            require(compute > 0, "project", "must be positive", got=compute)


@dataclass(kw_only=True)
class PilotConfig:
    """The search for the learning rate of every architecture at the smallest rung.

    Args:
        factors: learning rates that are tried, over `optimizer.lr` of the architecture.
        seeds: seeds of each; null: the first of the ladder.
        use: train the rungs with the best rates of the pilot, where there was one.
    """

    factors: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])
    seeds: list[int] | None = None
    use: bool = True

    def __post_init__(self) -> None:
        for factor in self.factors:
            require(0 < factor < math.inf, "factors", "must be positive and finite", got=factor)
        require(len(set(self.factors)) > 1, "factors", "has nothing to compare", got=self.factors,
                expected="two different factors or more")
        if self.seeds is not None:
            require(len(self.seeds) > 0, "seeds", "is empty", expected="at least one")
            require(len(set(self.seeds)) == len(self.seeds), "seeds", "has a seed twice", got=self.seeds)


@dataclass(kw_only=True)
class LadderConfig:
    """A ladder's own settings; its points are architectures x rungs x seeds.

    Args:
        name: name of its folder.
        overrides: settings of every point, key=value.
        architectures: settings of each by its name; `linear`, `full`, `ratio` and `pattern` are those of the schedule.
            `stages: {NAME: fraction}` gives stages of a recipe their part of the tokens.
        reference: the architecture that others are compared with; null: the first.
        rungs: names (r0 to r7, HIDDENxLAYERS) or mappings with the fields of RungConfig, in order of size.
        base: the rung for which hyperparameters were tuned; null: the first.
        tokens_per_parameter: tokens of training per parameter of the reference.
        seeds: of data order and first weights.
        match: the budget that all architectures of a rung share.
        parametrization: how hyperparameters are carried from the base rung.
        lr_batch_exponent: exponent of (batch / batch of the base) in the learning rate.
        lr_tokens_exponent: exponent of (tokens / tokens of the base) in the learning rate.
        validation_tokens: held-out tokens of each validation, the same on all rungs.
        probes: tasks that the architectures of the largest rung are trained on besides text.
        state_context: tokens of context at which the decode state is shown.
        decode_context: tokens of context behind which the time of a decoded token is measured after each training, on
            the machine that trained; null: it is not.
        pilot: the search for learning rates at the smallest rung.
    """

    name: str = "custom"
    overrides: list[str] = field(default_factory=list)
    architectures: dict[str, dict[str, Any]]
    reference: str | None = None
    rungs: list[Any]
    base: Any = None
    tokens_per_parameter: float = 20.0
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    match: Budget = "params"
    parametrization: Kind = "completep"
    lr_batch_exponent: float = 0.5
    lr_tokens_exponent: float = -0.35
    validation_tokens: int = 196_608
    probes: list[ProbeTask] = field(default_factory=list)
    state_context: int = 32768
    decode_context: int | None = 2048
    pilot: PilotConfig = field(default_factory=PilotConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    dir: str | None = None
    launcher: Launcher = "local"
    slurm: dict[str, Any] = field(default_factory=dict)
    ray: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(re.fullmatch(r"[\w.-]+", self.name) is not None, "name", "cannot name a folder", got=self.name,
                expected="letters, digits, '_', '-' and '.'")
        for key in ("architectures", "rungs", "seeds"):
            require(len(getattr(self, key)) > 0, key, "is empty", expected="at least one")
        for key in ("tokens_per_parameter", "validation_tokens", "state_context", "decode_context"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        for name in self.architectures:
            require(re.fullmatch(r"[\w.+-]+", name) is not None, f"architectures.{name}", "cannot name a folder",
                    got=name, expected="letters, digits, '_', '+', '-' and '.'")
        require(self.reference is None or self.reference in self.architectures, "reference", "is no architecture",
                got=self.reference, expected=f"one of {', '.join(self.architectures)}",
                hint=did_you_mean(self.reference or "", self.architectures))
        require(len(set(self.seeds)) == len(self.seeds), "seeds", "has a seed twice", got=self.seeds)
        names = [rung.name for rung in self.sizes]
        require(len(set(names)) == len(names), "rungs", "has a rung twice", got=names)
        for name in self.gate.rungs or ():
            require(name in names, "gate.rungs", "is no rung of this ladder", got=name,
                    expected=f"among {', '.join(names)}", hint=did_you_mean(name, names))

    @property
    def sizes(self) -> list[RungConfig]:
        """The rungs, in order of size."""
        return [_read_rung(rung, f"rungs.{index}") for index, rung in enumerate(self.rungs)]

    @property
    def base_size(self) -> RungConfig:
        """The rung for which hyperparameters were tuned."""
        return self.sizes[0] if self.base is None else next(
            (rung for rung in self.sizes if rung.name == self.base), None) or _read_rung(self.base, "base")

    @property
    def reference_name(self) -> str:
        """The architecture that others are compared with."""
        return self.reference or next(iter(self.architectures))

    @property
    def gate_rungs(self) -> list[str]:
        """Names of the rungs that count for verdicts."""
        return self.gate.rungs or [rung.name for rung in self.sizes][-2:]

    @property
    def folder(self) -> Path:
        """The folder that the ladder writes to."""
        return Path(self.dir).expanduser() if self.dir else Path("runs") / "ladders" / self.name


@dataclass(kw_only=True)
class LadderRequest:
    """A command line, read: the ladder's own settings, and the settings of every point with the root they go on."""

    ladder: LadderConfig
    root: str
    fixed: list[str]
    config_dir: str | None = None


def read_ladder_request(words: Sequence[str], config_dir: str | None = None,
                        saved: dict[str, Any] | None = None) -> LadderRequest:
    """The request of a command line `[CONFIG] ladder=NAME ladder.KEY=VALUE KEY=VALUE`.

    Args:
        words: the arguments.
        config_dir: a folder of the user's own config groups.
        saved: settings of a ladder that exists, on which those of the command line go.

    Raises:
        ConfigError: a ladder that does not exist, an unknown key of `ladder`.

    >>> request = read_ladder_request(["ladder=tiny", "ladder.seeds=0", "training.log_every=5"])
    >>> request.ladder.seeds, request.fixed[-1]
    ([0], 'training.log_every=5')
    """
    words = list(words)
    root = "train"
    if words and ("=" not in words[0] or Path(words[0]).is_file()) and not words[0].startswith("~"):
        root = words.pop(0)
    own: dict[str, Any] = {}
    fixed: dict[str, str] = {}
    asked: dict[str, Any] = dict(saved or {})
    for word in words:
        key, _, text = word.partition("=")
        key = key.removeprefix("++").removeprefix("+")
        if key == "ladder" and "=" in word:
            asked = read_plan_file("ladder", text, config_dir, required="architectures")
        elif key.startswith("ladder."):
            own[key.removeprefix("ladder.")] = text
        else:
            fixed[key] = word
    if not asked and "architectures" not in own:
        raise ConfigError("ladder", "is missing", expected="ladder=NAME or ladder=FILE.yaml, such as ladder=tiny",
                          hint="`hybridlm configs ladder` lists them")
    for key, text in own.items():
        _set_value(asked, key, _read_value(key, text))
    asked["probes"] = [to_dict(task) for task in read_tasks(asked.get("probes", []), "ladder.probes")]
    ladder = from_dict(LadderConfig, asked, "ladder")
    base = {word.partition("=")[0].lstrip("+"): word for word in ladder.overrides}
    return LadderRequest(ladder=ladder, root=root, fixed=list({**base, **fixed}.values()), config_dir=config_dir)


def check_projections(gate: GateConfig, largest: float) -> None:
    """Refuse projections far beyond the points of a ladder, unless they are asked for all the same.

    Args:
        gate: says what is projected.
        largest: FLOPs of the ladder's largest point, whether it has finished or not.

    Raises:
        ConfigError: a projection more than EXTRAPOLATION_MAX times beyond it.

    >>> check_projections(GateConfig(project=[1e14]), largest=1e13)
    """
    for compute in gate.project:
        if compute > EXTRAPOLATION_MAX * largest and not gate.extrapolate:
            raise ConfigError("ladder.gate.project", f"lies more than {EXTRAPOLATION_MAX:g} times beyond the compute "
                              "of the largest point", got=compute,
                              expected=f"at most {EXTRAPOLATION_MAX * largest:.3g}",
                              hint="ladder.gate.extrapolate=true projects all the same")


def architecture_words(ladder: LadderConfig, name: str) -> list[str]:
    """The settings of an architecture as one would type them.

    >>> ladder = LadderConfig(architectures={"kda": {"linear": "kda", "ratio": 3, "optimizer.lr": 0.01}}, rungs=["r0"])
    >>> architecture_words(ladder, "kda")
    ['model.schedule.linear=kda', 'model.schedule.ratio=3', 'optimizer.lr=0.01']
    """
    words = []
    for key, value in ladder.architectures[name].items():
        if key != "stages":
            full = f"model.schedule.{key}" if key in SCHEDULE_KEYS else key
            words.append(f"{full}={to_override_text(value)}")
    return words


def _read_rung(value: Any, path: str) -> RungConfig:
    if isinstance(value, str):
        return find_rung(value, path)
    if not isinstance(value, dict):
        raise ConfigError(path, "is no rung", got=value, expected="a name such as r0, or a mapping with hidden_size")
    name = value.get("name")
    data = value if name else {**value, "name": f"{value.get('hidden_size')}x{value.get('num_layers')}"}
    return from_dict(RungConfig, data, path)


def _read_value(key: str, text: str) -> Any:
    """The value of a key of the ladder, ladder.KEY=TEXT."""
    if key == "dir":
        return text or None
    if text.strip() == "":
        raise ConfigError(f"ladder.{key}", "has no value")
    if key == "probes":
        return parse_probes(text, "ladder.probes")
    if key in LIST_KEYS and not text.lstrip().startswith("["):
        return [_read_scalar(part) for part in text.split(",")]
    try:
        return yaml.load(text, Loader=Loader) if text.lstrip()[:1] in "[{" else _read_scalar(text)
    except yaml.YAMLError:
        raise ConfigError(f"ladder.{key}", "cannot be read", got=text,
                          expected="a value, [a, b] or {key: value}") from None


def _read_scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip()


def _set_value(asked: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of the ladder; what stands behind the name of an architecture is one key, dots and all.

    >>> asked = {"architectures": {"kda.v2": {}}}
    >>> _set_value(asked, "architectures.kda.v2.optimizer.lr", 0.03)
    >>> asked
    {'architectures': {'kda.v2': {'optimizer.lr': 0.03}}}
    """
    first, _, rest = key.partition(".")
    if not rest or first in ("slurm", "ray"):
        set_value(asked, key, value)
        return
    inner = asked.setdefault(first, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"ladder.{key}", f"'{first}' has no keys", got=value)
    known = [name for name in inner if rest.startswith(f"{name}.")]
    name = max(known, key=len, default=rest.partition(".")[0])  # a name may have dots
    option = rest[len(name) + 1:]
    if first == "architectures" and option:
        inner.setdefault(name, {})[option] = value
    else:
        inner[rest] = value
