"""Kimi Linear: KDA and MLA without positions, experts in all but the first layers.

transformers writes the dense layers' MLP under `block_sparse_moe` as well; released checkpoints have `mlp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop.families.common.config_fields import (
    count_leading_dense,
    list_layer_types,
    list_mlp_layer_types,
    read_base,
    read_deepseek_moe,
    read_mla,
    require_mixer,
    require_moe,
    write_base,
    write_deepseek_moe,
    write_mla,
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
from hybridlm.interop.rearrangements import Reshape
from hybridlm.interop.tensor_rules import TensorRule, map_tensors
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import DeltaRuleConfig, MLAConfig

MIXER_NAMES = {"linear_attention": "kda", "full_attention": "full"}


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    head_dim = hf.linear_head_dim
    kda = {"kind": "delta_rule", "decay": "channel", "gate": "softplus", "num_heads": hf.linear_num_heads,
           "head_dim": head_dim, "gate_rank": head_dim, "output_gate": "sigmoid", "output_gate_rank": head_dim,
           "conv_size": hf.linear_conv_kernel_dim}
    full = read_mla(hf, {"kind": "none"})
    layers = [MIXER_NAMES[kind] for kind in hf.layer_types]
    return read_base(hf, layers, {"kda": kda, "full": full}, read_deepseek_moe(hf, hf.mlp_layer_types))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    kda = require_mixer(config, DeltaRuleConfig)
    mla = require_mixer(config, MLAConfig)
    types = list_layer_types(config)
    renamed = {"n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_token",
               "n_shared_experts": "num_shared_experts", "norm_topk_prob": "moe_renormalize",
               "n_group": "num_expert_group", "scoring_func": "moe_router_activation_func"}
    full_layers = [number for number, kind in enumerate(types, start=1) if kind == "full_attention"]
    kda_layers = [number for number, kind in enumerate(types, start=1) if kind == "linear_attention"]
    moe = {renamed.get(key, key): value for key, value in write_deepseek_moe(require_moe(config)).items()}
    return write_base(config) | write_mla(mla) | moe | {
        "model_type": "kimi_linear", "model_max_length": config.max_position, "mla_use_nope": True,
        "head_dim": mla.qk_rope_head_dim, "first_k_dense_replace": count_leading_dense(config),
        "use_grouped_topk": True, "layer_types": types, "mlp_layer_types": list_mlp_layer_types(config),
        "linear_attn_config": {
            "full_attn_layers": full_layers, "kda_layers": kda_layers,
            "head_dim": kda.head_dim, "num_heads": kda.num_heads, "short_conv_kernel_size": kda.conv_size},
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    yield from map_norms(layer)
    ours = f"{layer.ours}mixer."
    theirs = f"{layer.theirs}self_attn."
    if isinstance(layer.mixer, MLAConfig):
        yield from map_mla(layer.mixer, ours, theirs)
    else:
        kda = require_kind(layer.mixer, DeltaRuleConfig)
        yield from rename_tensors(ours, theirs, "q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight",
                                  "f_a_proj.weight", "f_b_proj.weight", "dt_bias", "g_a_proj.weight",
                                  "g_b_proj.weight", "o_norm.weight", "o_proj.weight")
        heads = kda.value_heads
        yield map_tensors(f"{ours}A_log", f"{theirs}A_log", Reshape((heads,), (1, 1, heads, 1)))
        yield from map_convolutions(kda, ours, theirs)
    yield from map_feed_forward(config, layer, moe_name="block_sparse_moe", expert_names=("w1", "w3", "w2"))


FAMILY = register_family(Family(
    name="kimi_linear", architecture="KimiLinearForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer,
    renamed_keys=((r"\.self_attn\.forget_gate\.", ".self_attn."),
                  (r"\.mlp\.(gate\.|experts\.|shared_experts\.)", r".block_sparse_moe.\1"),
                  (r"\.block_sparse_moe\.((?:gate|up|down)_proj\.weight)$", r".mlp.\1")),
))
