"""Plain data to typed configs and back: `from_dict`, `to_dict`, and the YAML that checkpoints hold.

The dataclasses are the schema: type hints say what a value may be, defaults what it is when left out.
A mixer or feed-forward is chosen by its `kind` among the registered ones; nothing else can be built.
Every error is one line and names the dotted path of the value.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from hybridlm.config.plain_yaml import Dumper, Loader
from hybridlm.errors import ConfigError, did_you_mean, did_you_mean_or_own
from hybridlm.kind_registry import registry_of, registry_with
from hybridlm.model import feed_forward as feed_forward  # registers its kinds, as the next line does
from hybridlm.model import mixers as mixers
from hybridlm.plain_data import to_dict as to_dict
from hybridlm.unknown_keys import unknown_key

T = TypeVar("T")
MISSING = "???"  # OmegaConf's mark for a value that must be given
_SWITCHES = ("off", "on", "yes", "no")  # YAML 1.1 reads these words as booleans


def from_dict(cls: type[T], data: Any, path: str = "", *, root: type | None = None) -> T:
    """Build the dataclass `cls` from plain data (dicts, lists, scalars).

    Args:
        cls: a config class. A base class with a registry of kinds stands for the class of the kind that `data` names.
        data: keys and values; what is left out takes the default.
        path: dotted path of `data` in the whole config, for error messages.
        root: class of the whole config, whose other keys are offered when one stands in the wrong place; None is `cls`.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type, or one the dataclass refuses.
    """
    _refuse_targets(data, path)
    return _Reader(root or cls).config(cls, data, path)


def to_yaml(config: Any) -> str:
    """A resolved config as plain YAML, without tags and interpolations, with every value written out."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, width=110, allow_unicode=True)


def load_yaml(path: str | Path) -> Any:
    """Plain data from a YAML file.

    Raises:
        ConfigError: the file is missing, or is not YAML.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise ConfigError("", f"cannot read {path}", got=error.strerror, expected="a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise yaml_error(error, str(path)) from None


def yaml_error(error: yaml.YAMLError | UnicodeDecodeError, path: str) -> ConfigError:
    """One line that says where in the file at `path` the YAML breaks."""
    mark = getattr(error, "problem_mark", None)
    where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return ConfigError("", f"{path}{where} is not valid YAML: {problem}")


class _Reader:
    """Converts plain values by type hint.

    Args:
        root: the config class among whose keys a wrongly placed one is looked for.
    """

    def __init__(self, root: type):
        self.root = root

    def value(self, hint: Any, data: Any, path: str) -> Any:
        origin, args = get_origin(hint), get_args(hint)
        if data == MISSING and isinstance(data, str):
            raise ConfigError(path, "is missing", expected=describe(hint))
        if hint is Any:
            return data
        if origin in (Union, types.UnionType):
            return self.union(hint, args, data, path)
        if data is None:
            raise ConfigError(path, "must not be null", expected=describe(hint))
        if origin is Literal:
            return _literal(args, data, path)
        if origin is list:
            items = enumerate(_list(data, hint, path))
            return [self.value(args[0], item, _join(path, i)) for i, item in items]
        if origin is tuple:
            return self.fixed_list(hint, args, data, path)
        if origin is dict:
            return self.mapping(hint, args, data, path)
        if dataclasses.is_dataclass(hint):
            return self.config(hint, data, path)
        return _scalar(hint, data, path)

    def union(self, hint: Any, args: tuple, data: Any, path: str) -> Any:
        if data is None and type(None) in args:
            return None
        options = [arg for arg in args if arg is not type(None)]
        if len(options) == 1:
            return self.value(options[0], data, path)
        for option in options:
            try:
                return self.value(option, data, path)
            except ConfigError:
                continue
        raise ConfigError(path, "has the wrong type", got=data, expected=describe(hint))

    def fixed_list(self, hint: Any, args: tuple, data: Any, path: str) -> tuple:
        items = _list(data, hint, path)
        if args[-1] is Ellipsis:
            args = (args[0],) * len(items)
        if len(items) != len(args):
            raise ConfigError(path, "has the wrong length", got=data, expected=describe(hint))
        return tuple(self.value(args[i], item, _join(path, i)) for i, item in enumerate(items))

    def mapping(self, hint: Any, args: tuple, data: Any, path: str) -> dict:
        if not isinstance(data, dict):
            raise ConfigError(path, "has the wrong type", got=data, expected=describe(hint))
        result = {}
        for key, item in data.items():
            if args[0] is int and isinstance(key, str) and key.removeprefix("-").isdigit():
                key = int(key)  # keys that came from a command line are text
            result[self.value(args[0], key, path)] = self.value(args[1], item, _join(path, key))
        return result

    def config(self, cls: Any, data: Any, path: str) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise ConfigError(path, "has the wrong type", got=data,
                              expected=f"a mapping with keys among {', '.join(_hints(cls))}")
        cls, data = choose_kind(cls, data, path)
        hints = _hints(cls)
        for key in data:
            if key not in hints:
                raise self.unknown(cls, key, path)
        values = {key: self.value(hints[key], item, _join(path, key)) for key, item in data.items()}
        for field in dataclasses.fields(cls):
            if field.name not in values and _required(field):
                raise ConfigError(_join(path, field.name), "is missing", expected=describe(hints[field.name]))
        try:
            return cls(**values)
        except ConfigError as error:
            raise error.within(path) from None

    def unknown(self, cls: type, key: Any, path: str) -> ConfigError:
        """The error for a key `cls` does not have, with the nearest one that exists."""
        registry = registry_with(cls)
        owners = None if registry is None else (registry.key, _kinds_with(cls, key))
        return unknown_key(path, key, list(_hints(cls)), known_paths(self.root), owners)


def known_paths(cls: type, prefix: str = "") -> list[str]:
    """Every dotted path of a config class, the shortest first, without what stands in lists and dicts."""
    return sorted(_walk(cls, prefix), key=lambda path: path.count("."))


def _walk(cls: type, prefix: str) -> Iterator[str]:
    for name, hint in _all_hints(cls).items():
        path = _join(prefix, name)
        yield path
        inner = [arg for arg in (get_args(hint) or (hint,)) if dataclasses.is_dataclass(arg)]
        if get_origin(hint) not in (list, dict, tuple):
            for arg in inner:
                yield from _walk(arg, path)  # type: ignore[arg-type]


def hint_at(cls: Any, path: str) -> Any:
    """The type hint at a dotted path of a config class; None where the class does not say."""
    hint = cls
    for key in path.split("."):
        if get_origin(hint) in (Union, types.UnionType):
            hint = next((arg for arg in get_args(hint) if arg is not type(None)), None)
        if get_origin(hint) in (list, tuple, dict):
            hint = get_args(hint)[-1]
        else:
            hint = _all_hints(hint).get(key) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None
    return hint


def describe(hint: Any) -> str:
    """A type hint in words, for the 'expected' part of an error."""
    origin, args = get_origin(hint), get_args(hint)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(str(arg) for arg in args)}"
    if origin is list:
        return f"a list of {describe(args[0])}"
    if origin is tuple:
        return f"a list [{', '.join('...' if arg is Ellipsis else describe(arg) for arg in args)}]"
    if origin is dict:
        return f"a mapping of {describe(args[0])} to {describe(args[1])}"
    return "a mapping" if dataclasses.is_dataclass(hint) else "any value"


def choose_kind(cls: type, data: dict, path: str) -> tuple[type, dict]:
    """Find the config class of the kind that plain data names.

    Args:
        cls: base class of the configs of all kinds; one without kinds is returned as it is.
        data: options, with the kind among them.
        path: where they stand, for messages.

    Returns:
        The class, and `data` with the kind written out.

    Raises:
        ConfigError: the kind is missing or unknown.
    """
    registry = registry_of(cls)
    if registry is None:
        return cls, data
    where = _join(path, registry.key)
    kind = data.get(registry.key, registry.default or MISSING)
    expected = f"one of {', '.join(sorted(registry))}"
    if kind == MISSING:
        raise ConfigError(where, "is missing", expected=expected)
    if not isinstance(kind, str) or kind not in registry:
        raise ConfigError(where, f"unknown {registry.key}", got=kind, expected=expected,
                          hint=did_you_mean_or_own(str(kind), registry, registry.noun))
    return registry.config_class(kind), {registry.key: kind, **data}


def _kinds_with(cls: type, key: Any) -> list[str]:
    """The other kinds that do have the option `key`."""
    registry = registry_with(cls)
    if registry is None:
        return []
    return [kind for kind, (other, _) in registry.items() if other is not cls and key in _hints(other)]


def _scalar(hint: type, data: Any, path: str) -> Any:
    number = isinstance(data, int | float) and not isinstance(data, bool)
    if hint is float:
        if isinstance(data, str) and data.lstrip("+-.").lower() in ("inf", "infinity"):
            return -math.inf if data.startswith("-") else math.inf
        if number and not math.isnan(data):
            return float(data)
    elif hint is int:
        if number and math.isfinite(data) and data == int(data):  # 1e9 is a fair way to write a whole number
            return int(data)
    elif type(data) is hint:
        return data
    quotes = f"""quote it to make it text, on a command line {path}="'{data}'\""""
    what = "is not a number" if number and math.isnan(data) else "has the wrong type"
    raise ConfigError(path, what, got=data, expected=describe(hint),
                      hint=quotes if hint is str and isinstance(data, int | float) else "")


def _literal(options: tuple, data: Any, path: str) -> Any:
    if isinstance(data, bool):
        for word in _SWITCHES:
            if word in options and data == (word in ("on", "yes")):
                return word
    for option in options:
        if type(option) is type(data) and option == data:
            return option
    raise ConfigError(path, "unknown value", got=data, expected=describe(Literal[options]),
                      hint=did_you_mean(str(data), [str(option) for option in options]))


def _list(data: Any, hint: Any, path: str) -> list | tuple:
    if not isinstance(data, list | tuple):
        raise ConfigError(path, "has the wrong type", got=data, expected=describe(hint))
    return data


def _refuse_targets(data: Any, path: str) -> None:
    """Refuse Hydra's `_target_`, which names code to call: a config is data alone, wherever it comes from."""
    if isinstance(data, dict):
        for key, item in data.items():
            if key == "_target_":
                raise ConfigError(_join(path, key), "is refused: a config cannot name code to run", got=item,
                                  expected="a registered 'kind'")
            _refuse_targets(item, _join(path, key))
    elif isinstance(data, list | tuple):
        for index, item in enumerate(data):
            _refuse_targets(item, _join(path, index))


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Type hint of every field by name, in the order of the dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _all_hints(cls: type) -> dict[str, Any]:
    """Type hint of every field by name, of a class and all its kinds together; Any where two kinds differ."""
    registry = registry_of(cls)
    merged = dict(_hints(cls))
    for config, _ in registry.values() if registry is not None else ():
        for name, hint in _hints(config).items():
            merged[name] = hint if merged.get(name, hint) == hint else Any
    return merged


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
