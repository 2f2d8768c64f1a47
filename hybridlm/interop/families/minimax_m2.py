"""MiniMax-M2: softmax attention in every layer, norms over all heads of q and of k, sigmoid-routed experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop import config_fields, key_rules
from hybridlm.interop.family import Family, HFConfig
from hybridlm.interop.mapping import Rule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig
from hybridlm.model.mixers.contract import MixerConfig


def to_model(hf: HFConfig) -> dict[str, Any]:
    full = config_fields.attention_model(hf, config_fields.rope_model(hf, partial=True), qk_norm="full")
    moe = {"kind": "moe", "router": "sigmoid", "correction_bias": True, "num_experts": hf.num_local_experts,
           "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.intermediate_size}
    return config_fields.base_model(hf, ["full"] * hf.num_hidden_layers, {"full": full}, moe)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    full, moe = config_fields.the(config, AttentionConfig), config_fields.moe_of(config)
    return config_fields.base_hf(config) | config_fields.attention_hf(full) | {
        "model_type": "minimax_m2", "rope_parameters": config_fields.rope_hf(full.rope, partial=True),
        "rope_theta": full.rope.theta, "rotary_dim": full.rope.rotary_dim(full.head_dim), "use_qk_norm": True,
        "qk_norm_type": "per_layer", "intermediate_size": moe.moe_intermediate_size,
        "num_local_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok,
        "scoring_func": "sigmoid", "use_routing_bias": True, "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0, "output_router_logits": False,
    }


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    yield from key_rules.norms(o, t)
    yield from key_rules.attention_rules(key_rules.mixer_of(mixer, AttentionConfig), f"{o}mixer.", f"{t}self_attn.")
    yield from key_rules.feed_forward_rules(config.feed_forward, moe, o, t, moe_name="block_sparse_moe",
                                        experts=("w1", "w3", "w2"), bias="e_score_correction_bias")


FAMILY = Family(
    name="minimax_m2", architecture="MiniMaxM2ForCausalLM", to_model=to_model, to_hf=to_hf, layer=layer,
    renames=((r"\.mlp\.(gate\.|experts\.|e_score_correction_bias)", r".block_sparse_moe.\1"),),
)
