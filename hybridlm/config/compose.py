"""A run from a name and a list of overrides: Hydra composes the files, the schema checks the result.

Hydra only picks files (`model=...`, `experiment=...`). Values (`training.steps=100`) are set afterwards, here, so
that any key of the schema can be set whether or not a YAML file mentions it, and an unknown one is always refused.
"""

from __future__ import annotations

import copy
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hybridlm.config.checks import check_effective, validate
from hybridlm.config.composed_values import (
    apply_override,
    change_kinds,
    merge_options,
    one_line,
    plain_data,
    use_one_schedule_form,
)
from hybridlm.config.legacy import is_saved_config, refuse_renamed
from hybridlm.config.paths import options, search_folders
from hybridlm.config.presets import PRESET_GROUP, add_named_presets, refuse_idle_options
from hybridlm.config.schema import Config, DataConfig
from hybridlm.config.serialization import from_dict, hint_at, yaml_error
from hybridlm.config.staged_files import (
    ROOT_GROUPS,
    SAVED_OPTION,
    STAGED,
    YAML_ENDINGS,
    existing_file,
    stage_file,
    stage_root,
)
from hybridlm.errors import ConfigError, did_you_mean

_HYDRA_LOCK = threading.RLock()  # Hydra keeps its state in a global
_COMPOSED: dict[tuple[Any, ...], DictConfig] = {}  # what Hydra made of the same files before
MAX_COMPOSED = 64  # entries that are kept


@dataclass
class Composition:
    """A run as files and overrides give it, before it is checked.

    Args:
        config: the composed run, overrides applied.
        values: the overrides that set values.
        from_file: it was read from one YAML file, such as the config.yaml of a checkpoint.
        choices: what the overrides choose of each group: the name or file behind `model=` and `experiment=`.
        config_dir: the user's own folder of configs.
    """

    config: DictConfig
    values: list[Override]
    from_file: bool
    choices: dict[str, str]
    config_dir: str | Path | None

    def has(self, key: str) -> bool:
        """Whether the key at this dotted path is set to something other than null."""
        return OmegaConf.select(self.config, key) is not None

    def overrides(self, key: str) -> bool:
        """Whether an override sets the value at this dotted path itself."""
        return any(override.key_or_group == key for override in self.values)

    def value(self, key: str) -> Any:
        """Plain data at a dotted path, every interpolation replaced; None where nothing is set."""
        found: Any = plain_data(self.config)
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def set(self, key: str, value: Any) -> None:
        """Set a value that no override sets."""
        OmegaConf.update(self.config, key, value, force_add=True)

    def replace_model(self, model: dict[str, Any]) -> None:
        """Take another model, and then what the overrides say of it."""
        self.config.model = OmegaConf.create(model)
        for override in self.values:
            if override.key_or_group.startswith("model."):
                apply_override(self.config, override)

    def finish(self) -> Config:
        """The typed config of the run, checked.

        Raises:
            ConfigError: an unknown key, a wrong value, or sections that do not fit together.
        """
        data = plain_data(self.config)
        refuse_renamed(data)
        presets = options(PRESET_GROUP, self.config_dir)
        if not is_saved_config({"model": data.get("model")}):  # saved ones have every value
            refuse_idle_options(data.get("model"))
        data["model"] = add_named_presets(data.get("model"), presets, self._read_preset)
        result = from_dict(Config, data)
        validate(result)
        check_effective(result.recipe, [override.key_or_group for override in self.values])
        return result

    def finish_data(self) -> DataConfig:
        """The typed data section alone, checked; what the run's other sections say is not.

        Raises:
            ConfigError: an unknown key of it, or a wrong value.
        """
        data = {"data": plain_data(self.config).get("data")}
        refuse_renamed(data)
        return from_dict(DataConfig, data["data"], "data", root=Config)

    def _read_preset(self, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return compose_option(PRESET_GROUP, name, own, self.config_dir)
        except ConfigError as error:
            raise error.within(f"model.mixers.{name}") from None


def compose_run(name: str = "train", overrides: Sequence[str] = (),
                config_dir: str | Path | None = None) -> Composition:
    """Compose a run from files and overrides, as `hybridlm.run_config.load_config` takes them.

    Raises:
        ConfigError: a name that is not there, an override that cannot be read or set.
    """
    folders = search_folders(config_dir)
    overrides = [str(override) for override in overrides]
    with tempfile.TemporaryDirectory(prefix="hybridlm-config-") as staging:
        stage = Path(staging)
        root, chosen = stage_root(name, folders, stage)
        files, values = _separate(_parse([*chosen, *overrides]), folders, stage)
        config = _compose(root, files, [stage, *folders])
    use_one_schedule_form(config, values)
    change_kinds(config, values)
    for override in values:
        apply_override(config, override)
    choices = dict(text.lstrip("+").split("=", 1) for text in files if "=" in text)
    return Composition(config, values, from_file=root.startswith(STAGED), choices=choices, config_dir=config_dir)


def override_value(overrides: Sequence[str], key: str) -> Any:
    """The value that the last override of `key` gives it, read by Hydra's grammar; None where there is none.

    Example:
        >>> override_value(["training.steps=5", "run_dir='runs/a b'"], "run_dir")
        'runs/a b'
    """
    texts = [text for text in overrides if "=" in text and text.partition("=")[0].lstrip("+") == key]
    return _parse_one(texts[-1]).value() if texts else None


def override_keys(overrides: Sequence[str]) -> set[str]:
    """The keys of overrides: groups such as `model` of `model=quickstart`, and dotted paths.

    Example:
        >>> sorted(override_keys(["+model=quickstart", "training.steps=5"]))
        ['model', 'training.steps']
    """
    return {text.partition("=")[0].lstrip("+~").partition("@")[0] for text in overrides}


def compose_option(group: str, name: str, own: Mapping[str, Any] | None = None,
                   config_dir: str | Path | None = None) -> dict[str, Any]:
    """Plain data of one option of a group, with the files that it builds on.

    Args:
        group: such as "mixer".
        name: one of `options(group)`.
        own: keys and values that go on top.
        config_dir: the user's own folder of configs.

    Raises:
        ConfigError: no such option, or a file that cannot be read.

    Example:
        >>> compose_option("mixer", "deltanet", {"num_heads": 2})
        {'kind': 'delta_rule', 'decay': 'none', 'conv_size': 4, 'output_gate': 'none', 'num_heads': 2}
    """
    with tempfile.TemporaryDirectory(prefix="hybridlm-config-") as staging:
        stage = Path(staging)
        (stage / f"{STAGED}option.yaml").write_text(f"defaults:\n  - /{group}@_here_: {name}\n", encoding="utf-8")
        config = _compose(f"{STAGED}option", [], [stage, *search_folders(config_dir)])
    return plain_data(merge_options(config, own or {}))


def _parse(overrides: list[str]) -> list[Override]:
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(text, "is not an override", expected="key=value")
        override = _parse_one(text)
        if not override.key_or_group:
            raise ConfigError("", f"cannot read the override {text!r}: no key", expected="key=value")
        if override.is_sweep_override():
            raise ConfigError(override.key_or_group, "has several values, a run takes one", got=text.split("=", 1)[1],
                              hint="write a list as [a,b], or quote text that has a comma")
        if override.key_or_group.split("/")[0].split(".")[0] == "hydra":
            raise ConfigError(override.key_or_group, "Hydra's own settings are not used here")
        parsed.append(override)
    return parsed


def _parse_one(text: str) -> Override:
    """Read one override by Hydra's grammar.

    Where the schema wants text, a value that the grammar does not read as text is taken as it was typed: a path may
    have brackets, a name may be a number.
    """
    key, _, value = text.partition("=")
    wants_text = hint_at(Config, key.lstrip("+")) in (str, str | None) or value.endswith(YAML_ENDINGS)
    try:
        override = OverridesParser.create().parse_overrides([text])[0]
        if not wants_text or override.is_delete() or isinstance(override.value(), str | None):
            return override
    except OverrideParseException as error:
        if not wants_text or value[:1] in ("'", '"'):
            lines = [line.strip() for line in error.message.splitlines()]
            reasons = [line for line in lines[1:] if line and line != "^" and not line.startswith(("See http", text))]
            reason = reasons[0].split(":")[0] if reasons else "a special character"
            raise ConfigError("", f"cannot read the override {text!r}: {reason}", expected="key=value",
                              hint="quote a value with special characters: 'key=\"value\"'") from None
    return OverridesParser.create().parse_overrides([f"{key}={quote(value)}"])[0]


def _separate(overrides: list[Override], folders: list[Path], stage: Path) -> tuple[list[str], list[Override]]:
    """Separate the overrides that pick files, as words for Hydra, from those that set values.

    A YAML file of the user's own that is picked by its path is copied into `stage`, where Hydra finds it.
    """
    groups = {str(path.parent.relative_to(folder)) for folder in folders for path in folder.rglob("*.yaml")} - {"."}
    files, values = [], []
    for override in overrides:
        key, value = override.key_or_group, override.value()
        is_group = key in groups and not isinstance(value, dict)
        if not is_group and ("/" in key or override.package is not None):
            raise ConfigError(key, "unknown config group", expected=f"one of {', '.join(sorted(groups))}",
                              hint=did_you_mean(key, groups))
        if not is_group:
            values.append(override)
            continue
        named = isinstance(value, str) or (key == "experiment" and value is None)
        if key == "model" if override.is_delete() else not named:
            raise ConfigError(key, "must name a config", got=value if value is not None else "null",
                              expected=f"one of {', '.join(_in_group(key, folders))}")
        _refuse_path(key, value, folders)
        if isinstance(value, str) and value.endswith(YAML_ENDINGS):
            option = stage_file(existing_file(value, key), key, stage)
            target = f"{key}@{override.package}" if override.package is not None else key
            line = f"{'+' if override.is_add() else ''}{target}={option}"
        else:
            line = str(override.input_line)
        # The root config names these groups already, so a + would be one too many.
        files.append(line.removeprefix("+") if key in ROOT_GROUPS and override.package is None else line)
    return files, values


def _refuse_path(key: str, value: Any, folders: list[Path]) -> None:
    """Refuse a path where a config is chosen, with what takes one.

    Raises:
        ConfigError: `data=` or `model=` is a path that is no YAML file and no option.
    """
    if not isinstance(value, str) or value.endswith(YAML_ENDINGS) or value in _in_group(key, folders):
        return
    is_path = "/" in value or value.startswith((".", "~")) or Path(value).expanduser().exists()
    takes = {"data": f"data.path={value} takes text of your own",
             "model": f"init_from={value} takes the model and weights of a run or checkpoint, model=FILE.yaml a config"}
    if is_path and key in takes:
        raise ConfigError(key, "chooses a config by its name", got=value,
                          expected=f"one of {', '.join(_in_group(key, folders))}", hint=takes[key])


def _compose(name: str, overrides: list[str], folders: list[Path]) -> DictConfig:
    """The files of a run or an option as one config.

    Hydra takes a seventh of a second for it, and the points of a sweep differ in values alone. So what the same files
    gave before is used again.

    Args:
        name: of the root config in the first folder.
        overrides: those that pick files.
        folders: where files are looked for: a folder of staged files, which is new each time, then those that stay.
    """
    key = (name, *overrides, *_describe_files(folders[0], with_text=True),
           *(entry for folder in folders[1:] for entry in _describe_files(folder, with_text=False)))
    with _HYDRA_LOCK:
        if key not in _COMPOSED:
            if len(_COMPOSED) >= MAX_COMPOSED:
                _COMPOSED.clear()
            _COMPOSED[key] = _run_hydra(name, overrides, folders)
        return copy.deepcopy(_COMPOSED[key])


def _describe_files(folder: Path, *, with_text: bool) -> Iterator[tuple[Any, ...]]:
    """An entry per YAML file of a folder, which changes when the file does."""
    for path in sorted(folder.rglob("*.yaml")):
        if with_text:
            yield str(path.relative_to(folder)), path.read_bytes()
        else:
            stat = path.stat()
            yield str(path), stat.st_mtime_ns, stat.st_size


def _run_hydra(name: str, overrides: list[str], folders: list[Path]) -> DictConfig:
    """Run Hydra over `folders`, of which the first wins; a Hydra that is already in use is left as it was."""
    others = ",".join(quote(f"file://{folder}") for folder in folders[1:])
    with _HYDRA_LOCK, _own_hydra():
        try:
            with initialize_config_dir(str(folders[0]), job_name="hybridlm", version_base="1.3"):
                config = compose(name, [*overrides, f"hydra.searchpath=[{others}]"], return_hydra_config=True)
        except MissingConfigException as error:
            raise _missing_option(error, folders, overrides) from None
        except YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            raise yaml_error(error, Path(mark.name).name if mark else "a config file") from None
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            raise ConfigError("", one_line(error)) from None
    OmegaConf.set_struct(config, False)
    chosen = config.pop("hydra").runtime.choices.get("model")
    unnamed = isinstance(config.get("model"), DictConfig) and not config.model.get("name")
    if isinstance(chosen, str) and chosen != SAVED_OPTION and unnamed:
        config.model.name = chosen.removeprefix(STAGED)
    return config


@contextmanager
def _own_hydra() -> Iterator[None]:
    hydra = GlobalHydra.instance()
    outer, hydra.hydra = hydra.hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def _missing_option(error: MissingConfigException, folders: list[Path], overrides: list[str]) -> ConfigError:
    group, _, option = str(error.missing_cfg_file or "").rpartition("/")
    known = [name for name in _in_group(group or ".", folders) if not name.startswith(STAGED)]
    by = re.match(r"In '([^']*)'", str(error))
    what = "no such option"
    asked = any(text.endswith(f"={option}") for text in overrides)
    if by is not None and "/" in by[1] and not asked:
        what += f" (named in {by[1].replace(STAGED, '')}.yaml)"
    hint = did_you_mean(option, known)
    if group in ROOT_GROUPS:
        hint = hint or (f"{group}=FILE.yaml takes a file of your own, --config-dir FOLDER one in FOLDER/{group}/")
    if not group:
        hint = hint or "this file should be a whole run; a model's own file goes into model=FILE"
    return ConfigError(group, what, got=option, expected=f"one of {', '.join(known)}" if known else "", hint=hint)


def _in_group(group: str, folders: list[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def quote(text: str) -> str:
    """Quote a value for Hydra's grammar, in which backslashes count only before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), text)
    return f"'{escaped}'"
