"""MiniMax-M2: softmax attention in every layer, norms over all heads of q and of k, sigmoid-routed experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop.families.common.config_fields import (
    read_attention,
    read_base,
    read_rope,
    require_mixer,
    require_moe,
    write_attention,
    write_base,
    write_rope,
)
from hybridlm.interop.families.common.key_rules import map_attention, map_feed_forward, map_norms, require_kind
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.tensor_rules import TensorRule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    full = read_attention(hf, read_rope(hf, partial=True), qk_norm="full")
    moe = {"kind": "moe", "router": "sigmoid", "correction_bias": True, "num_experts": hf.num_local_experts,
           "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.intermediate_size}
    return read_base(hf, ["full"] * hf.num_hidden_layers, {"full": full}, moe)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    full = require_mixer(config, AttentionConfig)
    moe = require_moe(config)
    return write_base(config) | write_attention(full) | {
        "model_type": "minimax_m2", **write_rope(full.rope, partial=True),
        "rotary_dim": full.rope.rotary_dim(full.head_dim), "use_qk_norm": True,
        "qk_norm_type": "per_layer", "intermediate_size": moe.moe_intermediate_size,
        "num_local_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok,
        "scoring_func": "sigmoid", "use_routing_bias": True, "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0, "output_router_logits": False,
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    yield from map_norms(layer)
    attention = require_kind(layer.mixer, AttentionConfig)
    yield from map_attention(attention, f"{layer.ours}mixer.", f"{layer.theirs}self_attn.")
    yield from map_feed_forward(config, layer, moe_name="block_sparse_moe",
                                expert_names=("w1", "w3", "w2"), bias_name="e_score_correction_bias")


FAMILY = register_family(Family(
    name="minimax_m2", architecture="MiniMaxM2ForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer,
    renamed_keys=((r"\.mlp\.(gate\.|experts\.|e_score_correction_bias)", r".block_sparse_moe.\1"),),
))
