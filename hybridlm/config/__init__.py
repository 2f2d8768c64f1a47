"""Configs: the typed schema, composing by Hydra, checking, and plain YAML."""

from hybridlm.config.compose import load_config, load_model_config
from hybridlm.config.paths import config_dir
from hybridlm.config.schema import Config
from hybridlm.config.serialization import from_dict, load_yaml, to_dict, to_yaml

__all__ = ["Config", "config_dir", "from_dict", "load_config", "load_model_config", "load_yaml", "to_dict", "to_yaml"]
