"""docs/configuration.md names every key and option that there is."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from hybridlm.config.paths import config_dir, options
from hybridlm.config.plain_yaml import Loader
from hybridlm.config.schema import Config, DataSourceConfig, StageConfig
from hybridlm.config.serialization import hint_at, known_paths, to_dict
from hybridlm.kind_registry import registry_of
from hybridlm.model.feed_forward import DenseConfig, MoEConfig

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "configuration.md").read_text(encoding="utf-8")
MIXER_PRESETS = (DOCS / "mixers" / "README.md").read_text(encoding="utf-8")


def test_every_key_of_a_run_is_named():
    inner = {"model", "model.schedule", "model.residual", "model.norm", "model.mtp", "model.parametrization",
             "model.published", "data", "optimizer", "optimizer.schedule", "recipe", "training", "engine", "tracking"}
    elsewhere = "model.feed_forward."  # its own table
    paths = [path for path in known_paths(Config) if path not in inner and not path.startswith(elsewhere)]
    assert [path for path in paths if f"`{path}`" not in TEXT] == []


@pytest.mark.parametrize("cls", [MoEConfig, DenseConfig, StageConfig, DataSourceConfig])
def test_every_option_is_named(cls):
    missing = [field.name for field in dataclasses.fields(cls)
               if f"`{field.name}`" not in TEXT and f".{field.name}`" not in TEXT]
    assert set(missing) <= {"kind", "residual", "activation"}


def test_every_file_of_every_group_is_named():
    for group in (folder.name for folder in config_dir().iterdir() if folder.is_dir()):
        assert f"`{group}" in TEXT
        for option in options(group):
            tiny_experiment = group == "experiment" and option.endswith("_tiny")  # named together
            text = MIXER_PRESETS if group == "mixer" else TEXT
            assert tiny_experiment or f"`{option}`" in text, f"{group}/{option}"


def rows() -> list[tuple[str, str]]:
    """(dotted path, default as written) of the tables whose keys are paths."""
    found = []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        keys = re.findall(r"`([^`]+)`", cells[0])
        if line.startswith("| `") and keys and all(key in known_paths(Config) for key in keys):
            defaults = re.split(r", (?![^\[]*\])", cells[1])
            defaults *= len(keys) if len(defaults) == 1 else 1
            found += list(zip(keys, defaults, strict=True))
    return found


@pytest.mark.parametrize(("path", "written"), rows())
def test_defaults_are_as_written(path, written):
    if written in ("the file's name", "runs/MODEL NAME", "one stage"):
        return
    *parents, last = path.split(".")
    section = Config if not parents else hint_at(Config, ".".join(parents))
    section = next(arg for arg in (get_args(section) or (section,)) if dataclasses.is_dataclass(arg))
    registry = registry_of(section)
    if registry is not None and last == registry.key:
        assert written == registry.default or registry.default is None
        return
    classes = [section]
    if registry is not None:  # the default is that of the default kind, or of the only kinds that have the option
        kinds = [registry.default] * (registry.default is not None) + list(registry)
        with_it = [kind for kind in kinds if last in {field.name for field in dataclasses.fields(registry[kind][0])}]
        classes = [registry.config_class(kind) for kind in (with_it[:1] if with_it[0] == registry.default else with_it)]
    fields = [field for cls in classes for field in dataclasses.fields(cls) if field.name == last]
    for field in fields:
        if written == "required" or path.startswith("model.published"):
            assert field.default is dataclasses.MISSING
            assert field.default_factory is dataclasses.MISSING
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        as_text = {"off": "off"}  # which YAML takes for false
        assert to_dict(default) == as_text.get(written, yaml.load(written, Loader=Loader))
    assert fields
