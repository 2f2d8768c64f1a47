"""Qwen3-Next: Gated DeltaNet and gated softmax attention, zero-centred norms, experts with a gated shared one.

The projections of a linear layer come packed by key head: [q | k | values of its heads | gates of its heads], and
[b | a]; queries of a softmax layer come with their gates, head by head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop import config_fields, key_rules
from hybridlm.interop.family import Family, HFConfig
from hybridlm.interop.mapping import Rule, Split, rule
from hybridlm.model.config import MixerConfig, ModelConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig

NAMES = {"linear_attention": "gdn", "full_attention": "full"}


def gdn_model(hf: HFConfig) -> dict[str, Any]:
    return {"kind": "delta_rule", "decay": "scalar", "gate": "softplus", "output_gate": "silu",
            "num_heads": hf.linear_num_key_heads, "num_value_heads": hf.linear_num_value_heads,
            "head_dim": hf.linear_key_head_dim, "value_head_dim": hf.linear_value_head_dim,
            "conv_size": hf.linear_conv_kernel_dim, "a_init": [0.01, 16.0], "dt_bias_init": "ones"}


def qwen_model(hf: HFConfig, dense_layers: list[int], norm_topk_prob: bool) -> dict[str, Any]:
    """What Qwen3-Next and Qwen3.5 have in common."""
    bias = bool(hf.attention_bias)
    rope = config_fields.rope_model(hf, partial=True)
    full = config_fields.attention_model(hf, rope, qk_norm="head", output_gate="element", qkv_bias=bias, o_bias=bias)
    shared = hf.shared_expert_intermediate_size
    moe = {"kind": "moe", "router": "softmax", "num_experts": hf.num_experts,
           "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.moe_intermediate_size,
           "num_shared_experts": 1, "shared_intermediate_size": shared, "shared_gate": True,
           "norm_topk_prob": norm_topk_prob, "dense_layers": dense_layers,
           "intermediate_size": getattr(hf.object, "intermediate_size", None)}
    mtp = {"depth": 1, "mixer": "full"} if "mtp.fc.weight" in hf.keys else {}
    layers, mixers = [NAMES[kind] for kind in hf.layer_types], {"gdn": gdn_model(hf), "full": full}
    return config_fields.base_model(hf, layers, mixers, moe,
                                    norm={"eps": hf.rms_norm_eps, "zero_centered": True}, mtp=mtp)


def qwen_hf(config: ModelConfig) -> dict[str, Any]:
    gdn, full = config_fields.the(config, DeltaRuleConfig), config_fields.the(config, AttentionConfig)
    moe = config_fields.moe_of(config)
    return config_fields.base_hf(config) | config_fields.attention_hf(full) | {
        "rope_parameters": config_fields.rope_hf(full.rope, partial=True), "attention_bias": full.qkv_bias,
        "partial_rotary_factor": full.rope.partial_rotary_factor, "layer_types": config_fields.layer_types(config),
        "linear_num_key_heads": gdn.num_heads, "linear_num_value_heads": gdn.value_heads,
        "linear_key_head_dim": gdn.head_dim, "linear_value_head_dim": gdn.value_dim,
        "linear_conv_kernel_dim": gdn.conv_size, "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok, "moe_intermediate_size": moe.moe_intermediate_size,
        "shared_expert_intermediate_size": moe.shared_width, "router_aux_loss_coef": 0.001,
        "output_router_logits": False, "mtp_num_hidden_layers": config.mtp.depth,
    }


def to_model(hf: HFConfig) -> dict[str, Any]:
    return qwen_model(hf, sparse_step_dense_layers(hf), bool(hf.norm_topk_prob))


def sparse_step_dense_layers(hf: HFConfig) -> list[int]:
    """Dense layers of the Qwen MoE convention: a list, and all but every n-th layer."""
    return [i for i in range(hf.num_hidden_layers)
            if i in hf.mlp_only_layers or hf.num_experts == 0 or (i + 1) % hf.decoder_sparse_step]


def to_hf(config: ModelConfig) -> dict[str, Any]:
    moe = config_fields.moe_of(config)
    return qwen_hf(config) | {
        "model_type": "qwen3_next", "norm_topk_prob": moe.norm_topk_prob, "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
        "intermediate_size": moe.intermediate_size or moe.moe_intermediate_size,
    }


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    yield from key_rules.norms(o, t)
    if isinstance(mixer, AttentionConfig):
        yield from key_rules.attention_rules(mixer, f"{o}mixer.", f"{t}self_attn.", gate_in_q=True)
    else:
        gdn = key_rules.mixer_of(mixer, DeltaRuleConfig)
        ours, theirs, ratio = f"{o}mixer.", f"{t}linear_attn.", gdn.value_heads // gdn.num_heads
        sizes = (gdn.head_dim, gdn.head_dim, ratio * gdn.value_dim, ratio * gdn.value_dim)
        yield rule(tuple(f"{ours}{name}_proj.weight" for name in "qkvg"), f"{theirs}in_proj_qkvz.weight",
                   Split(sizes, gdn.num_heads))
        yield rule((f"{ours}b_proj.weight", f"{ours}a_proj.weight"), f"{theirs}in_proj_ba.weight",
                   Split((ratio, ratio), gdn.num_heads))
        yield from gdn_rules(gdn, ours, theirs)
    yield from key_rules.feed_forward_rules(config.feed_forward, moe, o, t, shared="shared_expert")


def gdn_rules(gdn: DeltaRuleConfig, o: str, t: str) -> Iterator[Rule]:
    yield from key_rules.same(o, t, "A_log", "dt_bias", ("o_norm.weight", "norm.weight"),
                         ("o_proj.weight", "out_proj.weight"))
    yield from key_rules.conv_rules(gdn, o, t, packed=True)


FAMILY = Family(name="qwen3_next", architecture="Qwen3NextForCausalLM", to_model=to_model, to_hf=to_hf, layer=layer,
                mtp="mtp")
