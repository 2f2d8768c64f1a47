"""MiniMax-01: Lightning attention and softmax attention, a residual of normed inputs, softmax-routed experts.

transformers saves the decay tables of Lightning layers; they follow from the config and are not read.
Released weights rotate `rotary_dim` dimensions of each head, which transformers ignores: it rotates all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
    map_feed_forward,
    map_norms,
    rename_tensors,
    require_kind,
)
from hybridlm.interop.family import DerivedTensor, Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.rearrangements import PackedRows
from hybridlm.interop.tensor_rules import TensorRule, map_tensors
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig, LinearAttentionConfig
from hybridlm.model.residual import BranchConfig

LIGHTNING_BLOCK_SIZE = 256  # tokens per block in transformers' Lightning attention
MIXER_NAMES = {"linear_attention": "lightning", "full_attention": "full"}


def read_residual(hf: HFConfig, prefix: str) -> dict[str, Any]:
    """Plain data of how one kind of branch joins the residual stream."""
    return {"form": "normed", "alpha": float(getattr(hf, f"{prefix}_alpha_factor")),
            "beta": float(getattr(hf, f"{prefix}_beta_factor"))}


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    hf.require_value("sliding_window", None)
    head_dim = hf.head_dim or hf.hidden_size // hf.num_attention_heads
    lightning = {"kind": "linear_attention", "decay": "constant", "slopes": "lightning", "feature_map": "silu",
                 "value_map": "silu", "scale": 1.0, "norm": "all", "norm_eps": 1e-6, "output_gate": "sigmoid",
                 "num_heads": hf.num_attention_heads, "head_dim": head_dim,
                 "residual": read_residual(hf, "linear_attn")}
    rope = read_rope(hf)
    rope["partial_rotary_factor"] = hf.raw.get("rotary_dim", head_dim) / head_dim
    full = read_attention(hf, rope, residual=read_residual(hf, "full_attn"))
    moe = {"kind": "moe", "router": "softmax", "num_experts": hf.num_local_experts,
           "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.intermediate_size,
           "residual": read_residual(hf, "mlp")}
    layers = [MIXER_NAMES[kind] for kind in hf.layer_types]
    return read_base(hf, layers, {"lightning": lightning, "full": full}, moe)


def write_residual(residual: BranchConfig, prefix: str) -> dict[str, Any]:
    """The fields that say how one kind of branch joins the residual stream."""
    return {f"{prefix}_alpha_factor": residual.alpha, f"{prefix}_beta_factor": residual.beta}


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    full = require_mixer(config, AttentionConfig)
    moe = require_moe(config)
    linear = [mixer for mixer in config.mixers.values() if isinstance(mixer, LinearAttentionConfig)]
    lightning = linear[0] if linear else full
    rotary = {} if full.rope.partial_rotary_factor == 1 else {"rotary_dim": full.rope.rotary_dim(full.head_dim)}
    return write_base(config) | write_attention(full) | rotary | {
        "model_type": "minimax", **write_rope(full.rope), "sliding_window": None,
        "intermediate_size": moe.moe_intermediate_size, "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok, "layer_types": list_layer_types(config),
        "block_size": LIGHTNING_BLOCK_SIZE,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "output_router_logits": False,
        **write_residual(full.residual, "full_attn"),
        **write_residual(lightning.residual, "linear_attn"),
        **write_residual(moe.residual or full.residual, "mlp"),
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    yield from map_norms(layer)
    ours = f"{layer.ours}mixer."
    theirs = f"{layer.theirs}self_attn."
    if isinstance(layer.mixer, AttentionConfig):
        yield from map_attention(layer.mixer, ours, theirs)
    else:
        lightning = require_kind(layer.mixer, LinearAttentionConfig)
        dim = lightning.head_dim
        yield map_tensors((f"{ours}q_proj.weight", f"{ours}k_proj.weight", f"{ours}v_proj.weight"),
                          f"{theirs}qkv_proj.weight", PackedRows((dim, dim, dim), lightning.num_heads))
        yield from rename_tensors(ours, theirs, ("g_proj.weight", "output_gate.weight"),
                                  ("o_norm.weight", "norm.weight"), ("o_proj.weight", "out_proj.weight"))
    yield from map_feed_forward(config, layer, moe_name="block_sparse_moe",
                                expert_names=("w1", "w3", "w2"))


def known_differences(config: ModelConfig) -> list[str]:
    """Sentences about what transformers computes differently from this model."""
    attention = [mixer for mixer in config.mixers.values() if isinstance(mixer, AttentionConfig)]
    if all(mixer.rope.partial_rotary_factor == 1 for mixer in attention):
        return []
    return ["transformers ignores rotary_dim in minimax and rotates whole heads: its logits will differ"]


def derive_tensors(config: ModelConfig) -> Iterator[DerivedTensor]:
    """The decay tables of each Lightning layer, as transformers' `MiniMaxLightningAttention` makes them."""
    block = LIGHTNING_BLOCK_SIZE
    for index, name in enumerate(config.layers()):
        mixer = config.mixers[name]
        if not isinstance(mixer, LinearAttentionConfig):
            continue
        heads = mixer.num_heads
        shapes = {"slope_rate": (heads, 1, 1), "query_decay": (heads, block, 1), "key_decay": (heads, block, 1),
                  "diagonal_decay": (1, heads, block, block)}
        for table, shape in shapes.items():
            yield DerivedTensor(f"model.layers.{index}.self_attn.{table}", shape,
                                partial(_compute_decay_table, table, heads, index, config.num_layers))


def _compute_decay_table(table: str, heads: int, index: int, num_layers: int) -> Tensor:
    """One decay table of layer `index`, in fp32."""
    rate = (1 / 2 ** (8 / heads)) ** (torch.arange(heads) + 1)
    rate = (rate * (1 - index / (num_layers - 1 + 1e-5) + 1e-5))[:, None, None]
    position = torch.arange(LIGHTNING_BLOCK_SIZE)[:, None] + 1
    if table == "slope_rate":
        return rate
    if table == "query_decay":
        return torch.exp(-rate * position)
    if table == "key_decay":
        return torch.exp(-rate * (LIGHTNING_BLOCK_SIZE - position))
    distance = rate * (position - position.T)[None, None]
    return torch.exp(torch.where(distance >= 0, -distance, -torch.inf))


FAMILY = register_family(Family(
    name="minimax", architecture="MiniMaxForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer, known_differences=known_differences, derived_tensors=derive_tensors,
    renamed_keys=((r"\.mlp\.(gate\.|experts\.)", r".block_sparse_moe.\1"),),
    ignored_keys=(r"\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$",),
))
