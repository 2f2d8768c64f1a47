"""YAML as this project reads and writes it: plain data, no tags, numbers as OmegaConf reads them."""

from __future__ import annotations

import re
from typing import Any

import yaml

# PyYAML follows YAML 1.1, for which 1e-3 is text; OmegaConf and everybody else read a number.
_FLOAT = re.compile(r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
                        |[0-9][0-9_]*[eE][-+]?[0-9]+
                        |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
                        |\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$""", re.X)


class Loader(yaml.SafeLoader):
    """Safe YAML with numbers such as 1e-3, without dates, and with repeated keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' stands twice",
                                                        key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class Dumper(yaml.SafeDumper):
    """Safe YAML that quotes text the loader would take for a number, and writes each object out in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _cls in (Loader, Dumper):
    _cls.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers
                if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")]
        for first, resolvers in _cls.yaml_implicit_resolvers.items()}
    _cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
