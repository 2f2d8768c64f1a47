"""Refuses a mistyped key of the command line before torch is imported.

The keys are read from the source of the config classes, without running it: importing them takes seconds. Whatever this
reading cannot decide (options of kinds, lists, free mappings) is left to the config itself, which checks every key.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from hybridlm.errors import ConfigError
from hybridlm.unknown_keys import NAMES_ELSEWHERE, unknown_key

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = ("config/schema.py", "model/config.py", "model/parametrization.py",
           "model/schedule.py", "model/norm.py", "optimizers/*.py",
           "distributed/engine_config.py", "distributed/engines/*.py", "distributed/zero/*.py")
KINDS = ("OptimizerConfig", "EngineConfig")  # each stands for all classes that derive from it
Fields = dict[str, str]  # field -> the text of its type


def check_keys(words: Sequence[str]) -> None:
    """Check the keys of overrides among the words of a command line, as far as that is possible without imports.

    Raises:
        ConfigError: a key that no config has.
    """
    own_code = any(word.startswith("--import") for word in words) or bool(os.environ.get("HYBRIDLM_IMPORT"))
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if "=" not in word or not re.fullmatch(r"\w+(\.\w+)*", key) or os.path.isfile(word):
            continue
        error = _unknown(key)
        if error is not None and not (own_code or importlib.metadata.entry_points(group="hybridlm.kinds")):
            raise error


def setting_for_option(option: str) -> str | None:
    """The setting that a person means by an option such as `--steps` or `--learning-rate`; None for no setting.

    Example:
        >>> setting_for_option("--steps"), setting_for_option("--learning-rate"), setting_for_option("--colour")
        ('training.steps', 'optimizer.lr', None)
    """
    name = option.lstrip("-").replace("-", "_")
    if name in _paths():
        return name
    found = next((path for path in _paths() if path.split(".")[-1] == name), None)
    return found or NAMES_ELSEWHERE.get(name)


def _unknown(key: str) -> ConfigError | None:
    """The error for a dotted key; None where it may be right."""
    parts, types = key.split("."), ["Config"]
    if (len(parts) == 1 and (_configs() / key).is_dir()) or key in _renamed():
        return None
    for index, part in enumerate(parts):
        fields: Fields = {}
        for name in types:
            fields |= _fields(name)
        if part not in fields:
            return unknown_key(".".join(parts[:index]), part, list(fields), _paths())
        text = fields[part]
        types = [name for name in re.findall(r"\w+", text) if name in _classes()]
        if not types or re.search(r"\b(list|dict|tuple|Any)\b", text):
            return None  # a value, or a container whose keys are free
    return None


@cache
def _configs() -> Path:
    return next((folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()), PACKAGE)


@cache
def _classes() -> dict[str, tuple[list[str], Fields]]:
    """Bases and own fields of every config class, in the order of the source."""
    found: dict[str, tuple[list[str], Fields]] = {}
    for file in (file for pattern in SOURCES for file in sorted(PACKAGE.glob(pattern))):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                fields = {item.target.id: ast.unparse(item.annotation) for item in node.body
                          if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                          and "ClassVar" not in ast.unparse(item.annotation)}
                found[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)], fields
    return found


@cache
def _fields(name: str) -> Fields:
    """Fields of a class with those of its bases; of a kind's base, with those of all kinds."""
    bases, own = _classes().get(name, ([], {}))
    fields: Fields = {}
    for base in bases:
        fields |= _own_and_inherited(base)
    fields |= own
    if name in KINDS:
        for other in _classes():
            if other != name and name in _ancestors(other):
                fields |= _own_and_inherited(other)
    return fields


def _own_and_inherited(name: str) -> Fields:
    bases, own = _classes().get(name, ([], {}))
    fields: Fields = {}
    for base in bases:
        fields |= _own_and_inherited(base)
    return fields | own


def _ancestors(name: str) -> set[str]:
    bases = _classes().get(name, ([], {}))[0]
    return {*bases, *(ancestor for base in bases for ancestor in _ancestors(base))}


@cache
def _paths() -> list[str]:
    """All dotted paths of the config that can be read, the shortest first."""
    return sorted(_walk("Config", ""), key=lambda path: path.count("."))


def _walk(name: str, prefix: str) -> Iterator[str]:
    for field, text in _fields(name).items():
        path = f"{prefix}.{field}" if prefix else field
        yield path
        if not re.search(r"\b(list|dict|tuple)\b", text):
            for inner in re.findall(r"\w+", text):
                if inner in _classes():
                    yield from _walk(inner, path)


@cache
def _renamed() -> set[str]:
    """Keys of earlier versions, which are refused by their own message."""
    for node in ast.parse((PACKAGE / "config/legacy.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "RENAMED_KEYS":
            assert node.value is not None
            return set(ast.literal_eval(node.value))
    return set()
