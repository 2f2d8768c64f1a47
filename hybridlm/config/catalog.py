"""The catalog of configs: the groups, the options of each with one sentence, and one option with its comments.

`hybridlm configs [GROUP [NAME]]` prints this. The sentence is the first one of the comment that opens an option's file.

>>> print(render(describe_configs("engine")).splitlines()[0])
engine=NAME    the processes that run a step
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from hybridlm.config.paths import config_dir, find_option, options, search_folders
from hybridlm.errors import ConfigError, did_you_mean
from hybridlm.kind_registry import all_registries

# Group -> (how the command line chooses an option of it, what the option sets). In the order in which they are listed.
GROUPS: dict[str, tuple[str, str]] = {
    "model": ("model=NAME", "a whole model"),
    "experiment": ("experiment=NAME", "a whole run: model, data, optimizer and sizes in one file"),
    "data": ("data=NAME", "the source of tokens"),
    "optimizer": ("optimizer=NAME", "the update rule and its learning-rate schedule"),
    "recipe": ("recipe=NAME", "the stages of a run"),
    "engine": ("engine=NAME", "the processes that run a step"),
    "sweep": ("sweep=NAME", "what `hybridlm sweep` varies"),
    "ladder": ("ladder=NAME", "what `hybridlm ladder` compares over sizes"),
    "mixer": ("model.schedule.linear=NAME", "the mixer of the layers that the schedule gives this name"),
    "feed_forward": ("feed_forward@model.feed_forward=NAME", "the form of the feed-forward"),
    "schedule": ("schedule@model.schedule=NAME", "the attention schedule, in models that take it from this group"),
}


def describe_configs(group: str | None = None, name: str | None = None,
                     own: str | Path | None = None) -> dict[str, Any]:
    """The catalog as plain data, ready for JSON.

    Args:
        group: a config group; None describes all groups.
        name: an option of the group; None lists its options.
        own: a folder of the user's own configs, searched besides the built-in one.

    Returns:
        {"groups": [...]} of all groups, each with `group`, `choose`, `meaning` and its `options`' names; or one
        group's {"group", "choose", "meaning", "options": [{"name", "summary", "built_in"}]}; or one option's
        {"group", "choose", "name", "summary", "file", "text"}, where `text` is the file as it was written.

    Raises:
        ConfigError: no such group or option.
    """
    known = _groups(own)
    if group is None:
        return {"groups": [{**_group(each), "options": options(each, own)} for each in known]}
    if group not in known:
        raise ConfigError("", "no such config group", got=group, expected=f"one of {', '.join(known)}",
                          hint=did_you_mean(group, known))
    kinds = _kinds_of_ones_own(group, own)
    names = [*options(group, own), *kinds]
    if name is None:
        return {**_group(group), "options": [_describe_kind(each, kinds[each]) if each in kinds else
                                             _option(group, each, own) for each in names]}
    file = find_option(group, name, own)
    if file is None and name in kinds:
        return {"group": group, "choose": _group(group)["choose"].replace("NAME", name), "name": name,
                "summary": _describe_kind(name, kinds[name])["summary"], "file": inspect.getfile(kinds[name]),
                "text": _options_as_yaml(name, kinds[name])}
    if file is None:
        raise ConfigError(group, "no such option", got=name, expected=f"one of {', '.join(names)}",
                          hint=did_you_mean(name, names))
    text = file.read_text(encoding="utf-8")
    return {"group": group, "choose": _group(group)["choose"].replace("NAME", name), "name": name,
            "summary": first_sentence(text), "file": str(file), "text": text}


def render(catalog: dict[str, Any]) -> str:
    """The text of what `describe_configs` returns."""
    if "text" in catalog:
        return f"# {catalog['choose']}\n# {catalog['file']}\n{catalog['text']}"
    if "groups" in catalog:
        rows = [(row["group"], f"{row['meaning']} ({row['choose']})" if row["meaning"] else f"({row['choose']})")
                for row in catalog["groups"]]
        return _columns(rows) + "\n`hybridlm configs GROUP` lists the options of a group.\n"
    heading = f"{catalog['choose']}    {catalog['meaning']}".rstrip()
    rows = [(row["name"], row["summary"]) for row in catalog["options"]]
    return f"{heading}\n{_columns(rows)}\n`hybridlm configs {catalog['group']} NAME` shows one of them.\n"


def first_sentence(text: str) -> str:
    """The first sentence of the comment that opens a YAML file; "" where it opens with none.

    Example:
        >>> first_sentence("# @package _global_\\n# A toy, for\\n# tests. Trains in seconds.\\nsteps: 3\\n")
        'A toy, for tests.'
    """
    comment = []
    for line in text.splitlines():
        if not line.startswith("#") or line.startswith("# hybridlm "):  # the options, or a command to paste
            break
        if not line.startswith("# @package"):
            comment.append(line.lstrip("#").strip())
    return re.split(r"(?<=\.)(?<!et al\.)\s+", " ".join(comment), maxsplit=1)[0]


def _groups(own: str | Path | None) -> list[str]:
    """Names of all groups: the known ones in their order, then those that only a user's folder has."""
    folders = [path for folder in search_folders(own) for path in folder.iterdir() if path.is_dir()]
    found = {path.name for path in folders if any(path.glob("*.yaml"))}
    return [group for group in GROUPS if group in found] + sorted(found - set(GROUPS))


def _group(group: str) -> dict[str, str]:
    choose, meaning = GROUPS.get(group, (f"{group}@KEY=NAME", ""))
    return {"group": group, "choose": choose, "meaning": meaning}


def _option(group: str, name: str, own: str | Path | None) -> dict[str, Any]:
    file = find_option(group, name, own)
    assert file is not None  # `options` named it
    return {"name": name, "summary": first_sentence(file.read_text(encoding="utf-8")),
            "built_in": file.is_relative_to(config_dir())}


def _kinds_of_ones_own(group: str, own: str | Path | None) -> dict[str, type]:
    """Mixer kinds that user code has registered and that are no preset: a schedule may name them like presets."""
    found: dict[str, type] = {}
    for registry in all_registries():
        if group == "mixer" == registry.noun:
            found = {kind: registry.config_class(kind) for kind in registry}
    return {kind: config for kind, config in found.items()
            if not config.__module__.startswith("hybridlm.") and kind not in options(group, own)}


def _describe_kind(kind: str, config: type) -> dict[str, Any]:
    words = " ".join((config.__doc__ or "").split())
    return {"name": kind, "summary": first_sentence(f"# {words}"), "built_in": False}


def _options_as_yaml(kind: str, config: Any) -> str:
    """The options of a registered kind with their defaults, ??? where one must be given."""
    lines = [f"kind: {kind}"]
    for field in dataclasses.fields(config):
        has_default = field.default is not dataclasses.MISSING
        if field.name != "kind" and field.default_factory is dataclasses.MISSING:
            lines.append(f"{field.name}: {json.dumps(field.default, default=str) if has_default else '???'}")
    return "\n".join(lines) + "\n"


def _columns(rows: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    return "".join(f"  {name:<{width}}  {meaning}".rstrip() + "\n" for name, meaning in rows)
