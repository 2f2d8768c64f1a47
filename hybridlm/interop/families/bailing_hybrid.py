"""Ling 3.0 (bailing_hybrid): KDA with a bounded gate and full-rank projections, MLA with a gate for each head.

transformers overwrites `head_dim` with the rotated dims of MLA when it saves a config; the dims of a KDA head are
then in `linear_head_dim`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hybridlm.interop import config_fields, key_rules
from hybridlm.interop.families import deepseek
from hybridlm.interop.family import Family, HFConfig
from hybridlm.interop.mapping import Rule
from hybridlm.model.config import MixerConfig, ModelConfig
from hybridlm.model.mixers import DeltaRuleConfig, MLAConfig

NAMES = {"linear_attention": "kda", "full_attention": "full"}


def to_model(hf: HFConfig) -> dict[str, Any]:
    hf.only("q_lora_rank", None)
    kda = {"kind": "delta_rule", "decay": "channel", "num_heads": hf.num_attention_heads,
           "head_dim": hf.raw.get("linear_head_dim", hf.linear_head_dim), "output_gate": "sigmoid",
           "conv_size": hf.short_conv_kernel_size, "gate_dtype": "model",
           "gate": "lower_bounded" if hf.kda_safe_gate else "softplus", "lower_bound": float(hf.kda_lower_bound)}
    full = config_fields.mla_model(hf, config_fields.rope_model(hf, "interleaved"), output_gate="head")
    numbers = deepseek.mtp_layers(hf)
    mtp = {"depth": len(numbers), "mixer": "full" if _is_mla(hf, numbers[0]) else "kda"} if numbers else {}
    return config_fields.base_model(hf, [NAMES[kind] for kind in hf.layer_types], {"kda": kda, "full": full},
                            config_fields.deepseek_moe_model(hf, hf.mlp_layer_types), mtp=mtp)


def _is_mla(hf: HFConfig, layer: int) -> bool:
    pattern = re.compile(rf"^model\.layers\.{layer}\.attention\.kv_b_proj\.weight$")
    return any(pattern.match(key) for key in hf.keys)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    kda, mla = config_fields.the(config, DeltaRuleConfig), config_fields.the(config, MLAConfig)
    moe, types = config_fields.deepseek_moe_hf(config_fields.moe_of(config)), config_fields.layer_types(config)
    renamed = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts",
               "scoring_func": "score_function"}
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    moe = {renamed.get(key, key): value for key, value in moe.items()}
    return config_fields.base_hf(config) | config_fields.mla_hf(mla) | moe | {
        "model_type": "bailing_hybrid", "head_dim": kda.head_dim, "linear_head_dim": kda.head_dim,
        "short_conv_kernel_size": kda.conv_size, "kda_safe_gate": kda.gate == "lower_bounded",
        "kda_lower_bound": kda.lower_bound, "layer_group_size": full[0] + 1 if full else config.num_layers + 1,
        "layer_types": types, "mlp_layer_types": config_fields.mlp_layer_types(config),
        "first_k_dense_replace": config_fields.leading_dense(config), "rope_theta": mla.rope.theta,
        "rope_parameters": config_fields.rope_hf(mla.rope), "num_nextn_predict_layers": config.mtp.depth,
    }


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    yield from key_rules.norms(o, t)
    ours, theirs = f"{o}mixer.", f"{t}attention."
    if isinstance(mixer, MLAConfig):
        yield from key_rules.mla_rules(mixer, ours, theirs, out="dense")
    else:
        kda = key_rules.mixer_of(mixer, DeltaRuleConfig)
        yield from key_rules.same(ours, theirs, "q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight",
                              "f_proj.weight", "g_proj.weight", "A_log", "dt_bias", "o_norm.weight",
                              ("o_proj.weight", "dense.weight"))
        yield from key_rules.conv_rules(kda, ours, theirs)
    yield from key_rules.feed_forward_rules(config.feed_forward, moe, o, t, bias="gate.expert_bias")


FAMILY = Family(
    name="bailing_hybrid", architecture="BailingHybridForCausalLM", to_model=to_model, to_hf=to_hf, layer=layer,
    embed="model.word_embeddings.weight", mtp="layers",
    renames=((r"^model\.embed_tokens\.", "model.word_embeddings."), (r"\.self_attn\.forget_gate\.", ".attention."),
             (r"\.self_attn\.o_proj\.", ".attention.dense."), (r"\.self_attn\.", ".attention."),
             (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.gate.expert_bias")),
)
