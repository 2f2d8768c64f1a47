"""Plain decoders as starting points: Llama, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop.families.common.config_fields import (
    read_attention,
    read_base,
    read_rope,
    require_dense,
    require_mixer,
    require_moe,
    write_attention,
    write_base,
    write_rope,
)
from hybridlm.interop.families.common.key_rules import map_attention, map_feed_forward, map_norms, require_kind
from hybridlm.interop.families.qwen3_next import list_dense_layers
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.tensor_rules import TensorRule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig


def _read_full_attention(hf: HFConfig, qk_norm: str) -> dict[str, Any]:
    bias = bool(hf.attention_bias)
    return read_attention(hf, read_rope(hf), qk_norm=qk_norm, qkv_bias=bias, o_bias=bias)


def _read_dense_model(hf: HFConfig, qk_norm: str) -> dict[str, Any]:
    dense = {"kind": "dense", "intermediate_size": hf.intermediate_size}
    return read_base(hf, ["full"] * hf.num_hidden_layers, {"full": _read_full_attention(hf, qk_norm)}, dense)


def read_llama(hf: HFConfig) -> dict[str, Any]:
    """Convert the transformers config of Llama to plain data of a `ModelConfig`."""
    hf.require_value("mlp_bias", False)
    return _read_dense_model(hf, "none")


def read_qwen3(hf: HFConfig) -> dict[str, Any]:
    """Convert the transformers config of Qwen3 to plain data of a `ModelConfig`."""
    hf.require_value("use_sliding_window", False)
    return _read_dense_model(hf, "head")


def read_qwen3_moe(hf: HFConfig) -> dict[str, Any]:
    """Convert the transformers config of Qwen3-MoE to plain data of a `ModelConfig`."""
    hf.require_value("use_sliding_window", False)
    moe = {"kind": "moe", "router": "softmax", "num_experts": hf.num_experts,
           "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.moe_intermediate_size,
           "norm_topk_prob": bool(hf.norm_topk_prob), "dense_layers": list_dense_layers(hf),
           "intermediate_size": hf.intermediate_size}
    return read_base(hf, ["full"] * hf.num_hidden_layers, {"full": _read_full_attention(hf, "head")}, moe)


def _write_attention_model(config: ModelConfig) -> dict[str, Any]:
    full = require_mixer(config, AttentionConfig)
    return write_base(config) | write_attention(full) | {
        **write_rope(full.rope), "attention_bias": full.qkv_bias}


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of Llama."""
    dense = require_dense(config)
    return _write_attention_model(config) | {"model_type": "llama", "mlp_bias": False,
                                             "intermediate_size": dense.intermediate_size}


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of Qwen3."""
    return write_llama(config) | {"model_type": "qwen3", "use_sliding_window": False, "sliding_window": None}


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of Qwen3-MoE."""
    moe = require_moe(config)
    return _write_attention_model(config) | {
        "model_type": "qwen3_moe", "use_sliding_window": False, "sliding_window": None,
        "num_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size, "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1, "mlp_only_layers": list(moe.dense_layers), "router_aux_loss_coef": 0.001,
        "intermediate_size": moe.intermediate_size or moe.moe_intermediate_size, "output_router_logits": False,
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    yield from map_norms(layer)
    attention = require_kind(layer.mixer, AttentionConfig)
    yield from map_attention(attention, f"{layer.ours}mixer.", f"{layer.theirs}self_attn.")
    yield from map_feed_forward(config, layer)


LLAMA = register_family(Family(
    name="llama", architecture="LlamaForCausalLM", read_config=read_llama, write_config=write_llama,
    map_layer=map_layer,
))
QWEN3 = register_family(Family(
    name="qwen3", architecture="Qwen3ForCausalLM", read_config=read_qwen3, write_config=write_qwen3,
    map_layer=map_layer,
))
QWEN3_MOE = register_family(Family(
    name="qwen3_moe", architecture="Qwen3MoeForCausalLM", read_config=read_qwen3_moe, write_config=write_qwen3_moe,
    map_layer=map_layer,
))
