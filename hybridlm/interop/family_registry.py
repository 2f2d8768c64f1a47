"""The families, and how one is found: for a config.json, and for a model of ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hybridlm.config.serialization import from_dict
from hybridlm.errors import CheckpointError, ConfigError, did_you_mean
from hybridlm.interop.families.native import MODEL_TYPE
from hybridlm.interop.family import Family, HFConfig
from hybridlm.model.canonical import canonical, differences
from hybridlm.model.config import ModelConfig

log = logging.getLogger("hybridlm")


@cache
def families() -> dict[str, Family]:
    """Every family by its model type. Where several formats can hold a model, the one it came from takes it, else the
    first one listed."""
    from hybridlm.interop.families import (
        bailing_hybrid,
        deepseek,
        kimi_linear,
        llama,
        minimax,
        minimax_m2,
        native,
        olmo_hybrid,
        qwen3_5_moe,
        qwen3_next,
    )

    listed = [qwen3_next.FAMILY, qwen3_5_moe.FAMILY, kimi_linear.FAMILY, minimax.FAMILY, minimax_m2.FAMILY, deepseek.V3,
              deepseek.V32, deepseek.GLM, bailing_hybrid.FAMILY, olmo_hybrid.FAMILY, llama.LLAMA, llama.QWEN3,
              llama.QWEN3_MOE, native.FAMILY]
    return {family.name: family for family in listed}


def family_named(name: str) -> Family:
    """The family of a model type, as asked for by the user.

    Raises:
        ConfigError: no such family.
    """
    if name not in families():
        raise ConfigError("family", "unknown", got=name, expected=f"one of {', '.join(sorted(families()))}",
                          hint=did_you_mean(name, families()))
    return families()[name]


def family_of(raw: Mapping[str, Any], where: str) -> tuple[Family, Mapping[str, Any]]:
    """The family of a config.json, and the part of it that describes the text model.

    Raises:
        CheckpointError: an architecture that is not known.
    """
    model_type = raw.get("model_type")
    for family in families().values():
        if model_type in (family.name, *family.aliases):
            return family, raw
        if model_type in family.text_of and isinstance(raw.get("text_config"), dict):
            text = {"tie_word_embeddings": raw["tie_word_embeddings"]} if "tie_word_embeddings" in raw else {}
            return family, text | raw["text_config"]
    known = sorted(name for f in families().values() for name in (f.name, *f.aliases, *f.text_of))
    raise CheckpointError(f"{where} is of model type {model_type!r}, which cannot be imported; known are "
                          + ", ".join(known))


def read_raw(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder of transformers."""
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
        import hybridlm.interop.auto  # noqa: F401  (registers it)
    drop = {"model_type", "transformers_version", "auto_map", "architectures", "quantization_config"}
    try:
        return AutoConfig.for_model(family.name, **{key: value for key, value in raw.items() if key not in drop})
    except (StrictDataclassError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("config.json", f"is not a {family.name} config: {reason}") from None


def read_config(family: Family, raw: Mapping[str, Any], keys: frozenset[str] = frozenset()) -> ModelConfig:
    """Our config of a config.json of `family`; `keys` are the tensors that come with it.

    Raises:
        ConfigError: a field that asks for what we do not have.
    """
    config = from_dict(ModelConfig, family.to_model(HFConfig(build_hf_config(family, raw), raw, keys)), "model")
    config.__post_init__()
    return config


def write_config(config: ModelConfig, name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that can hold this model, and its config.json without the fields that transformers adds.

    `name` asks for one family; then known differences of transformers are warned of instead of refused.

    Raises:
        ConfigError: the family asked for cannot, with the first field that does not fit.
    """
    if name is not None:
        family = family_named(name)
        raw, misfit = _try(family, config)
        if raw is None:
            raise misfit  # type: ignore[misc]
        for limit in family.limits(config):
            log.warning("%s", limit)
        return family, raw
    reasons: list[str] = []
    for family in sorted(families().values(), key=lambda f: f.name != config.name):  # stable: where it came from first
        raw, misfit = _try(family, config)
        limits = family.limits(config)
        if raw is not None and not limits:
            if family.name == MODEL_TYPE and config.name != MODEL_TYPE:
                log.warning("no model type of transformers computes this model; it is written as '%s', which "
                            "transformers loads after `import hybridlm.interop.auto`. Ask for a family by name to see "
                            "what does not fit it", MODEL_TYPE)
            return family, raw
        reasons.append(f"{family.name}: {misfit or limits[0]}")
    raise ConfigError("model", "fits no format: " + "; ".join(reasons))


def _try(family: Family, config: ModelConfig) -> tuple[dict[str, Any] | None, ConfigError | None]:
    """config.json of `config`, or why it cannot be had: what comes back must be the model that went in."""
    try:
        raw = family.to_hf(config)
        keys = frozenset(name for r in family.rules(config) for name in r.layouts[0].names)
        back = read_config(family, raw, keys)
    except ConfigError as error:
        return None, error
    except AssertionError:  # a mixer of a kind that the family's layers do not have
        return None, ConfigError("model.mixers", f"do not fit {family.name}")
    lost = differences(canonical(config), canonical(back))
    if lost:
        path, ours, theirs = lost[0]
        return None, ConfigError(f"model.{path}", f"cannot be said in {family.name}", got=ours,
                                 expected=f"{theirs!r}")
    return raw | {"architectures": [family.architecture]}, None
