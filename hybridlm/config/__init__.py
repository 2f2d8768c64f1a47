"""Configs: the typed schema, composing by Hydra, checks, plain YAML and names of earlier versions.

`hybridlm.run_config.load_config` loads one.
"""

from hybridlm.config.paths import config_dir
from hybridlm.config.schema import Config
from hybridlm.config.serialization import from_dict, load_yaml, to_dict, to_yaml

__all__ = ["Config", "config_dir", "from_dict", "load_yaml", "to_dict", "to_yaml"]
