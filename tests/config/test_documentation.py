"""docs/configuration.md names every key and option that there is."""

import dataclasses
from pathlib import Path

import pytest

from hybridlm.config.compose import config_dir, options
from hybridlm.config.convert import known_paths
from hybridlm.config.schema import Config, DataSourceConfig, StageConfig
from hybridlm.model.feed_forward import DenseConfig, MoEConfig

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_every_key_of_a_run_is_named():
    inner = {"model", "model.schedule", "model.norm", "model.mtp", "model.published", "data", "optimizer",
             "optimizer.schedule", "recipe", "training", "engine", "tracking"}
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
            assert tiny_experiment or f"`{option}`" in TEXT, f"{group}/{option}"
