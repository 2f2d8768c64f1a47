"""Finds the family of a config.json, or one that can hold a model of ours, and converts configs with it."""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hybridlm.config.serialization import from_dict
from hybridlm.errors import CheckpointError, ConfigError, did_you_mean
from hybridlm.interop import families as family_files
from hybridlm.interop.families.native import MODEL_TYPE
from hybridlm.interop.family import FAMILIES, Family, HFConfig
from hybridlm.model.canonical import canonical, differences
from hybridlm.model.config import ModelConfig

log = logging.getLogger("hybridlm")


@cache
def _import_families() -> None:
    """Import every file of the folder `families`, so that each registers its families."""
    for module in pkgutil.iter_modules(family_files.__path__):
        importlib.import_module(f"{family_files.__name__}.{module.name}")


def families() -> dict[str, Family]:
    """Every family by its model type, the preferred ones first.

    >>> list(families())[-1]
    'hybridlm'
    """
    _import_families()
    return dict(sorted(FAMILIES.items(), key=lambda item: -item[1].preference))


def get_family(name: str) -> Family:
    """The family of the model type that the user names.

    Raises:
        ConfigError: there is no such family.
    """
    if name not in families():
        raise ConfigError("family", "unknown", got=name, expected=f"one of {', '.join(sorted(families()))}",
                          hint=did_you_mean(name, families()))
    return families()[name]


def find_family(raw: Mapping[str, Any], where: str) -> tuple[Family, Mapping[str, Any]]:
    """The family of a config.json, and the section of it that describes the text model.

    Args:
        raw: the content of config.json.
        where: the checkpoint, for the error.

    Raises:
        CheckpointError: the model type is not known.
    """
    model_type = raw.get("model_type")
    for family in families().values():
        if model_type in (family.name, *family.aliases):
            return family, raw
        if model_type in family.multimodal_types and isinstance(raw.get("text_config"), dict):
            text = {"tie_word_embeddings": raw["tie_word_embeddings"]} if "tie_word_embeddings" in raw else {}
            return family, text | raw["text_config"]
    known = sorted(name for family in families().values()
                   for name in (family.name, *family.aliases, *family.multimodal_types))
    raise CheckpointError(f"{where} is of model type {model_type!r}, which cannot be imported; known are "
                          + ", ".join(known))


def read_config_json(folder: Path) -> dict[str, Any]:
    """The content of config.json in a checkpoint folder of transformers.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "does not exist" if not folder.exists() else "has no config.json"
        raise CheckpointError(f"{folder} {what}: expected a checkpoint folder of transformers") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a config: expected a JSON object")
    return raw


def build_hf_config(family: Family, raw: Mapping[str, Any]) -> Any:
    """The transformers config object of `raw`, defaults filled in as transformers does.

    Raises:
        ConfigError: transformers refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if family.name == MODEL_TYPE:
        import hybridlm.interop.auto  # noqa: F401  (registers it; imports transformers, which takes seconds)
    not_options = {"model_type", "transformers_version", "auto_map", "architectures", "quantization_config"}
    try:
        return AutoConfig.for_model(family.name, **{key: value for key, value in raw.items() if key not in not_options})
    except (StrictDataclassError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("config.json", f"is not a {family.name} config: {reason}") from None


def read_model_config(family: Family, raw: Mapping[str, Any], keys: frozenset[str] = frozenset()) -> ModelConfig:
    """Our config of a config.json.

    Args:
        family: the family it belongs to.
        raw: the content of config.json.
        keys: names of the tensors that come with it; MTP layers are read from these.

    Raises:
        ConfigError: a field asks for something that hybridlm does not have.

    >>> raw = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    >>> read_model_config(get_family("llama"), raw).layers()
    ['full', 'full']
    """
    config = from_dict(ModelConfig, family.read_config(HFConfig(build_hf_config(family, raw), raw, keys)), "model")
    config.__post_init__()
    return config


def write_hf_config(config: ModelConfig, family_name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that can hold a model, and its config.json without the fields that transformers adds.

    Args:
        config: the model.
        family_name: the family to use. Known differences of transformers are then warned of instead of refused.

    Raises:
        ConfigError: the family cannot hold the model; the error names the first field that does not fit.
    """
    if family_name is not None:
        family = get_family(family_name)
        raw = _write_and_compare(family, config)
        for difference in family.known_differences(config):
            log.warning("%s", difference)
        return family, raw
    reasons: list[str] = []
    own_family_first = sorted(families().values(), key=lambda family: family.name != config.name)  # keeps the order
    for family in own_family_first:
        differences_known = family.known_differences(config)
        try:
            raw = _write_and_compare(family, config)
        except ConfigError as error:
            reasons.append(f"{family.name}: {error}")
            continue
        if differences_known:
            reasons.append(f"{family.name}: {differences_known[0]}")
            continue
        if family.name == MODEL_TYPE and config.name != MODEL_TYPE:
            log.warning("no model type of transformers computes this model; it is written as '%s', which "
                        "transformers loads after `import hybridlm.interop.auto`. Ask for a family by name to see "
                        "what does not fit it", MODEL_TYPE)
        return family, raw
    raise ConfigError("model", "fits no format: " + "; ".join(reasons))


def _write_and_compare(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model; reading it must give the model back.

    Raises:
        ConfigError: the family cannot hold the model.
    """
    raw = family.write_config(config)
    keys = frozenset(name for rule in family.rules(config) for name in rule.layouts[0].names)
    back = read_model_config(family, raw, keys)
    lost = differences(canonical(config), canonical(back))
    if lost:
        path, ours, theirs = lost[0]
        raise ConfigError(f"model.{path}", f"cannot be said in {family.name}", got=ours, expected=f"{theirs!r}")
    return raw | {"architectures": [family.architecture]}
