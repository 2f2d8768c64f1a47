"""Qwen3-Next: Gated DeltaNet and gated softmax attention, zero-centred norms, experts with a gated shared one.

The projections of a linear layer come packed by key head: [q | k | values of its heads | gates of its heads], and
[b | a]; queries of a softmax layer come with their gates, head by head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop.families.common.config_fields import (
    list_layer_types,
    read_attention,
    read_base,
    read_rope,
    require_mixer,
    require_moe,
    write_attention,
    write_base,
    write_rope,
)
from hybridlm.interop.families.common.key_rules import (
    map_attention,
    map_convolutions,
    map_feed_forward,
    map_norms,
    rename_tensors,
    require_kind,
)
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.rearrangements import PackedRows
from hybridlm.interop.tensor_rules import TensorRule, map_tensors
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig

MIXER_NAMES = {"linear_attention": "gdn", "full_attention": "full"}


def read_gdn(hf: HFConfig) -> dict[str, Any]:
    """Make plain data of the Gated DeltaNet of Qwen."""
    return {"kind": "delta_rule", "decay": "scalar", "gate": "softplus", "output_gate": "silu",
            "num_heads": hf.linear_num_key_heads, "num_value_heads": hf.linear_num_value_heads,
            "head_dim": hf.linear_key_head_dim, "value_head_dim": hf.linear_value_head_dim,
            "conv_size": hf.linear_conv_kernel_dim, "a_init": [0.01, 16.0], "dt_bias_init": "ones"}


def read_qwen(hf: HFConfig, dense_layers: list[int], norm_topk_prob: bool) -> dict[str, Any]:
    """Plain data of our config from that of Qwen3-Next or Qwen3.5.

    Args:
        hf: their config.
        dense_layers: layers without experts.
        norm_topk_prob: whether the weights of the chosen experts are normalised.
    """
    bias = bool(hf.attention_bias)
    rope = read_rope(hf, partial=True)
    full = read_attention(hf, rope, qk_norm="head", output_gate="element", qkv_bias=bias, o_bias=bias)
    shared = hf.shared_expert_intermediate_size
    moe = {"kind": "moe", "router": "softmax", "num_experts": hf.num_experts,
           "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.moe_intermediate_size,
           "num_shared_experts": 1, "shared_intermediate_size": shared, "shared_gate": True,
           "norm_topk_prob": norm_topk_prob, "dense_layers": dense_layers,
           "intermediate_size": getattr(hf.config, "intermediate_size", None)}
    mtp = {"depth": 1, "mixer": "full"} if "mtp.fc.weight" in hf.keys else {}
    layers = [MIXER_NAMES[kind] for kind in hf.layer_types]
    return read_base(hf, layers, {"gdn": read_gdn(hf), "full": full}, moe,
                     norm={"eps": hf.rms_norm_eps, "zero_centered": True}, mtp=mtp)


def write_qwen(config: ModelConfig) -> dict[str, Any]:
    """The fields that Qwen3-Next and Qwen3.5 have in common."""
    gdn = require_mixer(config, DeltaRuleConfig)
    full = require_mixer(config, AttentionConfig)
    moe = require_moe(config)
    return write_base(config) | write_attention(full) | {
        **write_rope(full.rope, partial=True), "attention_bias": full.qkv_bias,
        "layer_types": list_layer_types(config),
        "linear_num_key_heads": gdn.num_heads, "linear_num_value_heads": gdn.value_heads,
        "linear_key_head_dim": gdn.head_dim, "linear_value_head_dim": gdn.value_dim,
        "linear_conv_kernel_dim": gdn.conv_size, "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok, "moe_intermediate_size": moe.moe_intermediate_size,
        "shared_expert_intermediate_size": moe.shared_width, "router_aux_loss_coef": 0.001,
        "output_router_logits": False, "mtp_num_hidden_layers": config.mtp.depth,
    }


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    return read_qwen(hf, list_dense_layers(hf), bool(hf.norm_topk_prob))


def list_dense_layers(hf: HFConfig) -> list[int]:
    """The layers without experts in the convention of Qwen: those listed, and all but every n-th layer."""
    return [index for index in range(hf.num_hidden_layers)
            if index in hf.mlp_only_layers or hf.num_experts == 0 or (index + 1) % hf.decoder_sparse_step]


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    moe = require_moe(config)
    return write_qwen(config) | {
        "model_type": "qwen3_next", "norm_topk_prob": moe.norm_topk_prob, "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
        "intermediate_size": moe.intermediate_size or moe.moe_intermediate_size,
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    yield from map_norms(layer)
    if isinstance(layer.mixer, AttentionConfig):
        yield from map_attention(layer.mixer, f"{layer.ours}mixer.", f"{layer.theirs}self_attn.", gate_in_q=True)
    else:
        gdn = require_kind(layer.mixer, DeltaRuleConfig)
        ours = f"{layer.ours}mixer."
        theirs = f"{layer.theirs}linear_attn."
        ratio = gdn.value_heads // gdn.num_heads
        sizes = (gdn.head_dim, gdn.head_dim, ratio * gdn.value_dim, ratio * gdn.value_dim)
        yield map_tensors(tuple(f"{ours}{name}_proj.weight" for name in "qkvg"), f"{theirs}in_proj_qkvz.weight",
                          PackedRows(sizes, gdn.num_heads))
        yield map_tensors((f"{ours}b_proj.weight", f"{ours}a_proj.weight"), f"{theirs}in_proj_ba.weight",
                          PackedRows((ratio, ratio), gdn.num_heads))
        yield from map_gdn(gdn, ours, theirs)
    yield from map_feed_forward(config, layer, shared_name="shared_expert")


def map_gdn(gdn: DeltaRuleConfig, ours: str, theirs: str) -> Iterator[TensorRule]:
    """Yield rules for the tensors of Gated DeltaNet that Qwen3-Next and Qwen3.5 store alike."""
    yield from rename_tensors(ours, theirs, "A_log", "dt_bias", ("o_norm.weight", "norm.weight"),
                              ("o_proj.weight", "out_proj.weight"))
    yield from map_convolutions(gdn, ours, theirs, packed=True)


FAMILY = register_family(Family(
    name="qwen3_next", architecture="Qwen3NextForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer, mtp_keys="mtp",
))
