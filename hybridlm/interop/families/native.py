"""The model type `hybridlm`: our own names and config inside the files of transformers. It holds every model.

Loading it in transformers needs `import hybridlm.interop.auto` first; no code comes from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hybridlm.config.serialization import to_dict
from hybridlm.errors import ConfigError
from hybridlm.interop.family import Family, HFConfig
from hybridlm.interop.mapping import Rule, Spec, rule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers.contract import MixerConfig

MODEL_TYPE = "hybridlm"
PREFIX = "model."  # our parameter names stand under this one


def to_model(hf: HFConfig) -> dict[str, Any]:
    data = hf.raw.get("model")
    if not isinstance(data, dict):
        raise ConfigError("config.json: model", "is missing", expected="the model section of a hybridlm config")
    return dict(data)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The model section as it is, and the fields that tools look for in any config."""
    heads = next((m.num_heads for name in config.layers() if hasattr(m := config.mixers[name], "num_heads")), 1)
    return {
        "model_type": MODEL_TYPE, "model": to_dict(config), "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers, "num_attention_heads": heads,
        "max_position_embeddings": config.max_position, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    return iter(())


@dataclass(frozen=True, kw_only=True)
class Native(Family):
    """Every tensor under its own name."""

    def rules(self, config: ModelConfig) -> list[Rule]:
        from hybridlm.model.model import build_model
        from hybridlm.tensor_storage import unique_tensors

        return [rule(name, PREFIX + name) for name in unique_tensors(build_model(config, device="meta"))]

    def spell(self, names: Mapping[str, Spec]) -> tuple[dict[str, Spec], dict[str, str]]:
        """Exports of earlier versions hold their parameter names."""
        from hybridlm.checkpoint.legacy_names import are_legacy, current_name

        spelling = {current_name(name) if are_legacy(names) else name: name for name in names}
        return {name: names[old] for name, old in spelling.items()}, spelling


FAMILY = Native(name=MODEL_TYPE, architecture="HybridLMForCausalLM", to_model=to_model, to_hf=to_hf, layer=layer)
