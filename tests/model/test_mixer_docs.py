"""The mixer pages name every option, and their examples can be used."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from hybridlm.config.plain_yaml import Loader
from hybridlm.config.serialization import from_dict
from hybridlm.model.mixers import MIXERS, IndexerConfig
from hybridlm.model.mixers.contract import MixerConfig

PAGES = Path(__file__).parents[2] / "docs" / "mixers"
CONFIGS = {kind: config for kind, (config, _) in MIXERS.items() if config.__module__.startswith("hybridlm.")}
CONFIGS |= {"indexer": IndexerConfig}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_page_names_every_option(kind):
    text = (PAGES / f"{kind}.md").read_text(encoding="utf-8")
    shared = (PAGES / "README.md").read_text(encoding="utf-8") + (PAGES / "delta_rule.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(CONFIGS[kind]):
        if field.name not in ("kind", "residual"):
            assert f"`{field.name}`" in text or (kind == "linear_attention" and f"`{field.name}`" in shared), field.name


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_examples_of_a_page_are_valid(kind):
    examples = re.findall(r"```yaml\n(.*?)```", (PAGES / f"{kind}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    for name, data in yaml.load(examples[0], Loader=Loader).items():
        config = from_dict(MixerConfig, data, name)
        assert config.kind == kind or (kind == "indexer" and config.indexer is not None)
