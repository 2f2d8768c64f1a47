"""DeepSeek-V3 and V3.2, GLM-5: multi-head latent attention, with an indexer (DSA) from V3.2 on, sigmoid-routed experts.

MTP layers follow the last layer. GLM-5 rotates index heads in interleaved pairs and lets layers share the
selection of an earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.interop.families.common.config_fields import (
    count_leading_dense,
    list_mlp_layer_types,
    read_base,
    read_deepseek_moe,
    read_mla,
    read_rope,
    require_mixer,
    require_moe,
    write_base,
    write_deepseek_moe,
    write_mla,
    write_rope,
)
from hybridlm.interop.families.common.key_rules import map_feed_forward, map_mla, map_norms, require_kind
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.tensor_rules import TensorRule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import MLAConfig
from hybridlm.model.mixers.contract import MixerConfig


def find_mtp_layers(hf: HFConfig) -> list[int]:
    """Numbers of the MTP layers in a checkpoint."""
    matches = [re.match(r"model\.layers\.(\d+)\.eh_proj\.weight$", key) for key in hf.keys]
    numbers = {int(match[1]) for match in matches if match}
    return sorted(number for number in numbers if number >= hf.num_hidden_layers)


def list_mlp_types(hf: HFConfig) -> list[str]:
    """The `mlp_layer_types`, or what `first_k_dense_replace` makes them."""
    listed = getattr(hf.config, "mlp_layer_types", None)
    if listed:
        return listed
    return ["dense" if index < hf.first_k_dense_replace else "sparse" for index in range(hf.num_hidden_layers)]


def read_v3(hf: HFConfig) -> dict[str, Any]:
    """Convert the transformers config of DeepSeek-V3 to plain data of a `ModelConfig`."""
    kind = "interleaved" if hf.rope_interleave else "half"
    full = read_mla(hf, read_rope(hf, kind))
    return read_base(hf, ["full"] * hf.num_hidden_layers, {"full": full}, read_deepseek_moe(hf, list_mlp_types(hf)),
                     mtp={"depth": len(find_mtp_layers(hf))})


def write_v3(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of DeepSeek-V3."""
    mla = require_mixer(config, MLAConfig)
    moe = write_deepseek_moe(require_moe(config))
    return write_base(config) | write_mla(mla) | moe | {
        "model_type": "deepseek_v3", **write_rope(mla.rope),
        "rope_interleave": mla.rope.kind == "interleaved", "first_k_dense_replace": count_leading_dense(config),
        "num_nextn_predict_layers": config.mtp.depth,
    }


def read_dsa(hf: HFConfig, rope_kind: str, index_kinds: list[str]) -> dict[str, Any]:
    """Make plain data of a config with MLA and an indexer in every layer.

    Args:
        hf: their config.
        rope_kind: how the indexer pairs rotated dimensions, half or interleaved.
        index_kinds: "full" for a layer with an indexer of its own, "shared" for one that takes an earlier selection.
    """
    hf.require_value("mlp_bias", False)
    rope = read_rope(hf, "interleaved")
    indexer = {"num_heads": hf.index_n_heads, "head_dim": hf.index_head_dim, "topk": hf.index_topk,
               "rope_kind": rope_kind}
    mixers = {"dsa": read_mla(hf, rope, indexer=indexer),
              "dsa_shared": read_mla(hf, rope, indexer=indexer | {"share": True})}
    layers = ["dsa" if kind == "full" else "dsa_shared" for kind in index_kinds]
    return read_base(hf, layers, mixers, read_deepseek_moe(hf, list_mlp_types(hf)), mtp=_read_dsa_mtp(hf))


def _read_dsa_mtp(hf: HFConfig) -> dict[str, Any]:
    numbers = find_mtp_layers(hf)
    return {"depth": len(numbers), "mixer": "dsa"} if numbers else {}


def read_v32(hf: HFConfig) -> dict[str, Any]:
    """Convert the transformers config of DeepSeek-V3.2 to plain data of a `ModelConfig`."""
    return read_dsa(hf, "half", ["full"] * hf.num_hidden_layers)


def read_glm(hf: HFConfig) -> dict[str, Any]:
    """Convert the transformers config of GLM-5 to plain data of a `ModelConfig`."""
    return read_dsa(hf, "interleaved", list(hf.indexer_types))


def write_dsa(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of DeepSeek-V3.2."""
    mla = require_mixer(config, MLAConfig)
    if mla.indexer is None:
        raise ConfigError("mixers.indexer", "is missing, but the format has one in every layer")
    return write_v3(config) | {
        "model_type": "deepseek_v32", "index_n_heads": mla.indexer.num_heads, "index_head_dim": mla.indexer.head_dim,
        "index_topk": mla.indexer.topk, "layer_types": ["indexed_attention"] * config.num_layers,
        "mlp_layer_types": list_mlp_layer_types(config), "mlp_bias": False,
    }


def write_glm(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of GLM-5."""
    kinds = ["shared" if _shares_selection(config.mixers[name]) else "full" for name in config.layers()]
    return write_dsa(config) | {"model_type": "glm_moe_dsa", "indexer_types": kinds}


def _shares_selection(mixer: MixerConfig) -> bool:
    return isinstance(mixer, MLAConfig) and mixer.indexer is not None and mixer.indexer.share


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    yield from map_norms(layer)
    mla = require_kind(layer.mixer, MLAConfig)
    yield from map_mla(mla, f"{layer.ours}mixer.", f"{layer.theirs}self_attn.")
    yield from map_feed_forward(config, layer)


KIMI_K2_KEYS = ((r"^language_model\.(model|lm_head)\.", r"\1."), (r"^model\.language_model\.", "model."))

V3 = register_family(Family(
    name="deepseek_v3", architecture="DeepseekV3ForCausalLM", read_config=read_v3, write_config=write_v3,
    map_layer=map_layer, aliases=("kimi_k2",), multimodal_types=("kimi_k25",), renamed_keys=KIMI_K2_KEYS,
    mtp_keys="layers", ignored_keys=(r"^(model\.)?(vision_tower|mm_projector|multi_modal_projector)\.",),
))
V32 = register_family(Family(
    name="deepseek_v32", architecture="DeepseekV32ForCausalLM", read_config=read_v32, write_config=write_dsa,
    map_layer=map_layer, mtp_keys="layers",
))
GLM = register_family(Family(
    name="glm_moe_dsa", architecture="GlmMoeDsaForCausalLM", read_config=read_glm, write_config=write_glm,
    map_layer=map_layer, mtp_keys="layers",
))
