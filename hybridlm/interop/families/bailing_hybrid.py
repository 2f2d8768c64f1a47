"""Ling 3.0 (bailing_hybrid): KDA with a bounded gate and full-rank projections, MLA with one gate per head.

transformers overwrites `head_dim` with the rotated dimensions of MLA when it saves a config; the dimensions of a KDA
head are then in `linear_head_dim`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hybridlm.interop.families import deepseek
from hybridlm.interop.families.common.config_fields import (
    count_leading_dense,
    list_layer_types,
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
from hybridlm.interop.families.common.key_rules import (
    map_convolutions,
    map_feed_forward,
    map_mla,
    map_norms,
    rename_tensors,
    require_kind,
)
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.tensor_rules import TensorRule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import DeltaRuleConfig, MLAConfig

MIXER_NAMES = {"linear_attention": "kda", "full_attention": "full"}


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    hf.require_value("q_lora_rank", None)
    kda = {"kind": "delta_rule", "decay": "channel", "num_heads": hf.num_attention_heads,
           "head_dim": hf.raw.get("linear_head_dim", hf.linear_head_dim), "output_gate": "sigmoid",
           "conv_size": hf.short_conv_kernel_size, "gate_dtype": "model",
           "gate": "lower_bounded" if hf.kda_safe_gate else "softplus", "lower_bound": float(hf.kda_lower_bound)}
    full = read_mla(hf, read_rope(hf, "interleaved"), output_gate="head")
    layers = [MIXER_NAMES[kind] for kind in hf.layer_types]
    return read_base(hf, layers, {"kda": kda, "full": full}, read_deepseek_moe(hf, hf.mlp_layer_types),
                     mtp=_read_mtp(hf))


def _read_mtp(hf: HFConfig) -> dict[str, Any]:
    numbers = deepseek.find_mtp_layers(hf)
    if not numbers:
        return {}
    return {"depth": len(numbers), "mixer": "full" if _is_mla(hf, numbers[0]) else "kda"}


def _is_mla(hf: HFConfig, layer: int) -> bool:
    pattern = re.compile(rf"^model\.layers\.{layer}\.attention\.kv_b_proj\.weight$")
    return any(pattern.match(key) for key in hf.keys)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    kda = require_mixer(config, DeltaRuleConfig)
    mla = require_mixer(config, MLAConfig)
    types = list_layer_types(config)
    renamed = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts",
               "scoring_func": "score_function"}
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    moe = {renamed.get(key, key): value for key, value in write_deepseek_moe(require_moe(config)).items()}
    return write_base(config) | write_mla(mla) | moe | {
        "model_type": "bailing_hybrid", "head_dim": kda.head_dim, "linear_head_dim": kda.head_dim,
        "short_conv_kernel_size": kda.conv_size, "kda_safe_gate": kda.gate == "lower_bounded",
        "kda_lower_bound": kda.lower_bound, "layer_group_size": full[0] + 1 if full else config.num_layers + 1,
        "layer_types": types, "mlp_layer_types": list_mlp_layer_types(config),
        "first_k_dense_replace": count_leading_dense(config), **write_rope(mla.rope),
        "num_nextn_predict_layers": config.mtp.depth,
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    yield from map_norms(layer)
    ours = f"{layer.ours}mixer."
    theirs = f"{layer.theirs}attention."
    if isinstance(layer.mixer, MLAConfig):
        yield from map_mla(layer.mixer, ours, theirs, output="dense")
    else:
        kda = require_kind(layer.mixer, DeltaRuleConfig)
        yield from rename_tensors(ours, theirs, "q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight",
                                  "f_proj.weight", "g_proj.weight", "A_log", "dt_bias", "o_norm.weight",
                                  ("o_proj.weight", "dense.weight"))
        yield from map_convolutions(kda, ours, theirs)
    yield from map_feed_forward(config, layer, bias_name="gate.expert_bias")


FAMILY = register_family(Family(
    name="bailing_hybrid", architecture="BailingHybridForCausalLM", read_config=read_config,
    write_config=write_config, map_layer=map_layer, embedding_key="model.word_embeddings.weight", mtp_keys="layers",
    renamed_keys=((r"^model\.embed_tokens\.", "model.word_embeddings."),
                  (r"\.self_attn\.forget_gate\.", ".attention."),
                  (r"\.self_attn\.o_proj\.", ".attention.dense."), (r"\.self_attn\.", ".attention."),
                  (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.gate.expert_bias")),
))
