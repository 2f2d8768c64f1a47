"""The model type `hybridlm`: our own names and config inside the files of transformers, for any model.

Loading it in transformers needs `import hybridlm.interop.auto` first; no code comes from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hybridlm.checkpoint.legacy_names import are_legacy, current_name
from hybridlm.config.legacy import upgrade_config
from hybridlm.config.serialization import to_dict
from hybridlm.errors import ConfigError
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.tensor_rules import TensorRule, TensorSpec, map_tensors
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import build_model
from hybridlm.tensor_storage import unique_tensors

MODEL_TYPE = "hybridlm"
PREFIX = "model."  # before our parameter names


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config, also one that an earlier version wrote, to plain data of a `ModelConfig`."""
    data = hf.raw.get("model")
    if not isinstance(data, dict):
        raise ConfigError("config.json: model", "is missing", expected="the model section of a hybridlm config")
    return upgrade_config({"model": data})["model"]


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json: the model section, and the fields that tools expect in any config."""
    heads = next((m.num_heads for name in config.layers() if hasattr(m := config.mixers[name], "num_heads")), 1)
    return {
        "model_type": MODEL_TYPE, "model": to_dict(config), "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers, "num_attention_heads": heads,
        "max_position_embeddings": config.max_position, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """No rules: `NativeFamily.rules` maps the whole model."""
    return iter(())


@dataclass(frozen=True, kw_only=True)
class NativeFamily(Family):
    """The family that keeps every tensor under its own name."""

    def rules(self, config: ModelConfig) -> list[TensorRule]:
        """One rule per tensor of the model."""
        return [map_tensors(name, PREFIX + name) for name in unique_tensors(build_model(config, device="meta"))]

    def to_official_names(self, found: Mapping[str, TensorSpec]) -> tuple[dict[str, TensorSpec], dict[str, str]]:
        """The specs by the parameter names of this version; exports of earlier versions have others."""
        legacy = are_legacy(found)
        spelling = {current_name(name) if legacy else name: name for name in found}
        return {official: found[name] for official, name in spelling.items()}, spelling


FAMILY = register_family(NativeFamily(
    name=MODEL_TYPE, architecture="HybridLMForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer, preference=-2,
))
