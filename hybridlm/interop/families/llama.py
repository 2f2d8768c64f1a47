"""Plain decoders as starting points: Llama, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop import config_fields, key_rules
from hybridlm.interop.families.qwen3_next import sparse_step_dense_layers
from hybridlm.interop.family import Family, HFConfig
from hybridlm.interop.mapping import Rule
from hybridlm.model.config import MixerConfig, ModelConfig
from hybridlm.model.mixers import AttentionConfig


def _full(hf: HFConfig, qk_norm: str) -> dict[str, Any]:
    bias = bool(hf.attention_bias)
    return config_fields.attention_model(hf, config_fields.rope_model(hf), qk_norm=qk_norm, qkv_bias=bias, o_bias=bias)


def _dense_model(hf: HFConfig, qk_norm: str) -> dict[str, Any]:
    dense = {"kind": "dense", "intermediate_size": hf.intermediate_size}
    return config_fields.base_model(hf, ["full"] * hf.num_hidden_layers, {"full": _full(hf, qk_norm)}, dense)


def llama_to_model(hf: HFConfig) -> dict[str, Any]:
    hf.only("mlp_bias", False)
    return _dense_model(hf, "none")


def qwen3_to_model(hf: HFConfig) -> dict[str, Any]:
    hf.only("use_sliding_window", False)
    return _dense_model(hf, "head")


def qwen3_moe_to_model(hf: HFConfig) -> dict[str, Any]:
    hf.only("use_sliding_window", False)
    moe = {"kind": "moe", "router": "softmax", "num_experts": hf.num_experts,
           "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.moe_intermediate_size,
           "norm_topk_prob": bool(hf.norm_topk_prob), "dense_layers": sparse_step_dense_layers(hf),
           "intermediate_size": hf.intermediate_size}
    return config_fields.base_model(hf, ["full"] * hf.num_hidden_layers, {"full": _full(hf, "head")}, moe)


def _attention_hf(config: ModelConfig) -> dict[str, Any]:
    full = config_fields.the(config, AttentionConfig)
    return config_fields.base_hf(config) | config_fields.attention_hf(full) | {
        "rope_parameters": config_fields.rope_hf(full.rope), "rope_theta": full.rope.theta,
        "attention_bias": full.qkv_bias}


def llama_to_hf(config: ModelConfig) -> dict[str, Any]:
    return _attention_hf(config) | {"model_type": "llama", "mlp_bias": False,
                                    "intermediate_size": config_fields.dense_of(config).intermediate_size}


def qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
    return llama_to_hf(config) | {"model_type": "qwen3", "use_sliding_window": False, "sliding_window": None}


def qwen3_moe_to_hf(config: ModelConfig) -> dict[str, Any]:
    moe = config_fields.moe_of(config)
    return _attention_hf(config) | {
        "model_type": "qwen3_moe", "use_sliding_window": False, "sliding_window": None,
        "num_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size, "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1, "mlp_only_layers": list(moe.dense_layers), "router_aux_loss_coef": 0.001,
        "intermediate_size": moe.intermediate_size or moe.moe_intermediate_size, "output_router_logits": False,
    }


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    yield from key_rules.norms(o, t)
    yield from key_rules.attention_rules(key_rules.mixer_of(mixer, AttentionConfig), f"{o}mixer.", f"{t}self_attn.")
    yield from key_rules.feed_forward_rules(config.feed_forward, moe, o, t)


LLAMA = Family(name="llama", architecture="LlamaForCausalLM", to_model=llama_to_model, to_hf=llama_to_hf, layer=layer)
QWEN3 = Family(name="qwen3", architecture="Qwen3ForCausalLM", to_model=qwen3_to_model, to_hf=qwen3_to_hf, layer=layer)
QWEN3_MOE = Family(name="qwen3_moe", architecture="Qwen3MoeForCausalLM", to_model=qwen3_moe_to_model,
                   to_hf=qwen3_moe_to_hf, layer=layer)
