"""Configs: the typed schema, composing by Hydra, checking, and plain YAML."""

from hybridlm.config.compose import config_dir, load_config, load_model_config
from hybridlm.config.convert import from_dict, load_yaml, to_dict, to_yaml
from hybridlm.config.schema import Config

__all__ = ["Config", "config_dir", "from_dict", "load_config", "load_model_config", "load_yaml", "to_dict", "to_yaml"]
