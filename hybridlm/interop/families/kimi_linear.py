"""Kimi Linear: KDA and MLA without positions, experts in all but the first layers.

transformers writes the dense layers' MLP under `block_sparse_moe` as well; released checkpoints have `mlp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop import config_fields, key_rules
from hybridlm.interop.family import Family, HFConfig
from hybridlm.interop.mapping import Reshape, Rule, rule
from hybridlm.model.config import MixerConfig, ModelConfig
from hybridlm.model.mixers import DeltaRuleConfig, MLAConfig

NAMES = {"linear_attention": "kda", "full_attention": "full"}


def to_model(hf: HFConfig) -> dict[str, Any]:
    head_dim = hf.linear_head_dim
    kda = {"kind": "delta_rule", "decay": "channel", "gate": "softplus", "num_heads": hf.linear_num_heads,
           "head_dim": head_dim, "gate_rank": head_dim, "output_gate": "sigmoid", "output_gate_rank": head_dim,
           "conv_size": hf.linear_conv_kernel_dim}
    full = config_fields.mla_model(hf, {"kind": "none"})
    return config_fields.base_model(hf, [NAMES[kind] for kind in hf.layer_types], {"kda": kda, "full": full},
                            config_fields.deepseek_moe_model(hf, hf.mlp_layer_types))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    kda, mla = config_fields.the(config, DeltaRuleConfig), config_fields.the(config, MLAConfig)
    moe, types = config_fields.deepseek_moe_hf(config_fields.moe_of(config)), config_fields.layer_types(config)
    renamed = {"n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_token",
               "n_shared_experts": "num_shared_experts", "norm_topk_prob": "moe_renormalize",
               "n_group": "num_expert_group", "scoring_func": "moe_router_activation_func"}
    numbered = {kind: [i for i, t in enumerate(types, start=1) if t == kind] for kind in NAMES}
    moe = {renamed.get(key, key): value for key, value in moe.items()}
    return config_fields.base_hf(config) | config_fields.mla_hf(mla) | moe | {
        "model_type": "kimi_linear", "model_max_length": config.max_position, "mla_use_nope": True,
        "head_dim": mla.qk_rope_head_dim, "first_k_dense_replace": config_fields.leading_dense(config),
        "use_grouped_topk": True, "layer_types": types, "mlp_layer_types": config_fields.mlp_layer_types(config),
        "linear_attn_config": {
            "full_attn_layers": numbered["full_attention"], "kda_layers": numbered["linear_attention"],
            "head_dim": kda.head_dim, "num_heads": kda.num_heads, "short_conv_kernel_size": kda.conv_size},
    }


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    yield from key_rules.norms(o, t)
    ours, theirs = f"{o}mixer.", f"{t}self_attn."
    if isinstance(mixer, MLAConfig):
        yield from key_rules.mla_rules(mixer, ours, theirs)
    else:
        kda = key_rules.mixer_of(mixer, DeltaRuleConfig)
        yield from key_rules.same(ours, theirs, "q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight",
                              "f_a_proj.weight", "f_b_proj.weight", "dt_bias", "g_a_proj.weight", "g_b_proj.weight",
                              "o_norm.weight", "o_proj.weight")
        heads = kda.value_heads
        yield rule(f"{ours}A_log", f"{theirs}A_log", Reshape((heads,), (1, 1, heads, 1)))
        yield from key_rules.conv_rules(kda, ours, theirs)
    yield from key_rules.feed_forward_rules(config.feed_forward, moe, o, t, moe_name="block_sparse_moe",
                                        experts=("w1", "w3", "w2"))


FAMILY = Family(
    name="kimi_linear", architecture="KimiLinearForCausalLM", to_model=to_model, to_hf=to_hf, layer=layer,
    renames=((r"\.self_attn\.forget_gate\.", ".self_attn."),
             (r"\.mlp\.(gate\.|experts\.|shared_experts\.)", r".block_sparse_moe.\1"),
             (r"\.block_sparse_moe\.((?:gate|up|down)_proj\.weight)$", r".mlp.\1")),
)
