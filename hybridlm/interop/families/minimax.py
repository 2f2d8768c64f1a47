"""MiniMax-01: Lightning attention and softmax attention, a residual of normed inputs, softmax-routed experts.

transformers saves the decay tables of Lightning layers; they follow from the config and are not read.
Released weights rotate `rotary_dim` dims of a head, which transformers ignores: it rotates all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridlm.interop import config_fields, key_rules
from hybridlm.interop.family import Derived, Family, HFConfig
from hybridlm.interop.mapping import Rule, Split, rule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig, LinearAttentionConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.residual import BranchConfig

BLOCK_SIZE = 256  # of transformers' Lightning attention
NAMES = {"linear_attention": "lightning", "full_attention": "full"}


def residual_model(hf: HFConfig, prefix: str) -> dict[str, Any]:
    return {"form": "normed", "alpha": float(getattr(hf, f"{prefix}_alpha_factor")),
            "beta": float(getattr(hf, f"{prefix}_beta_factor"))}


def to_model(hf: HFConfig) -> dict[str, Any]:
    hf.only("sliding_window", None)
    head_dim = hf.head_dim or hf.hidden_size // hf.num_attention_heads
    lightning = {"kind": "linear_attention", "decay": "constant", "slopes": "lightning", "feature_map": "silu",
                 "value_map": "silu", "scale": 1.0, "norm": "all", "norm_eps": 1e-6, "output_gate": "sigmoid",
                 "num_heads": hf.num_attention_heads, "head_dim": head_dim,
                 "residual": residual_model(hf, "linear_attn")}
    rope = config_fields.rope_model(hf)
    rope["partial_rotary_factor"] = hf.raw.get("rotary_dim", head_dim) / head_dim
    full = config_fields.attention_model(hf, rope, residual=residual_model(hf, "full_attn"))
    moe = {"kind": "moe", "router": "softmax", "num_experts": hf.num_local_experts,
           "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.intermediate_size,
           "residual": residual_model(hf, "mlp")}
    layers = [NAMES[kind] for kind in hf.layer_types]
    return config_fields.base_model(hf, layers, {"lightning": lightning, "full": full}, moe)


def residual_hf(residual: BranchConfig, prefix: str) -> dict[str, Any]:
    return {f"{prefix}_alpha_factor": residual.alpha, f"{prefix}_beta_factor": residual.beta}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    full, moe = config_fields.the(config, AttentionConfig), config_fields.moe_of(config)
    lightning = next((m for m in config.mixers.values() if isinstance(m, LinearAttentionConfig)), None)
    rotary = {} if full.rope.partial_rotary_factor == 1 else {"rotary_dim": full.rope.rotary_dim(full.head_dim)}
    return config_fields.base_hf(config) | config_fields.attention_hf(full) | rotary | {
        "model_type": "minimax", "rope_parameters": config_fields.rope_hf(full.rope), "sliding_window": None,
        "intermediate_size": moe.moe_intermediate_size, "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok, "layer_types": config_fields.layer_types(config),
        "block_size": BLOCK_SIZE,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "output_router_logits": False,
        **residual_hf(full.residual, "full_attn"),
        **residual_hf((lightning or full).residual, "linear_attn"),
        **residual_hf(moe.residual or full.residual, "mlp"),
    }


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    yield from key_rules.norms(o, t)
    ours, theirs = f"{o}mixer.", f"{t}self_attn."
    if isinstance(mixer, AttentionConfig):
        yield from key_rules.attention_rules(mixer, ours, theirs)
    else:
        lightning = key_rules.mixer_of(mixer, LinearAttentionConfig)
        dim = lightning.head_dim
        yield rule((f"{ours}q_proj.weight", f"{ours}k_proj.weight", f"{ours}v_proj.weight"),
                   f"{theirs}qkv_proj.weight", Split((dim, dim, dim), lightning.num_heads))
        yield from key_rules.same(ours, theirs, ("g_proj.weight", "output_gate.weight"),
                                  ("o_norm.weight", "norm.weight"), ("o_proj.weight", "out_proj.weight"))
    yield from key_rules.feed_forward_rules(config.feed_forward, moe, o, t, moe_name="block_sparse_moe",
                                        experts=("w1", "w3", "w2"))


def limits(config: ModelConfig) -> list[str]:
    if all(m.rope.partial_rotary_factor == 1 for m in config.mixers.values() if isinstance(m, AttentionConfig)):
        return []
    return ["transformers ignores rotary_dim in minimax and rotates whole heads: its logits will differ"]


def derived(config: ModelConfig) -> Iterator[Derived]:
    """The decay tables of each Lightning layer, as transformers' `MiniMaxLightningAttention` makes them."""
    for index, name in enumerate(config.layers()):
        mixer, prefix = config.mixers[name], f"model.layers.{index}.self_attn."
        if isinstance(mixer, LinearAttentionConfig):
            H, n = mixer.num_heads, BLOCK_SIZE
            shapes = {"slope_rate": (H, 1, 1), "query_decay": (H, n, 1), "key_decay": (H, n, 1),
                      "diagonal_decay": (1, H, n, n)}
            for table, shape in shapes.items():
                yield prefix + table, shape, partial(_decay_table, table, H, index, config.num_layers)


def _decay_table(table: str, heads: int, index: int, num_layers: int) -> Tensor:
    rate = (1 / 2 ** (8 / heads)) ** (torch.arange(heads) + 1)
    rate = (rate * (1 - index / (num_layers - 1 + 1e-5) + 1e-5))[:, None, None]
    position = torch.arange(BLOCK_SIZE)[:, None] + 1
    if table == "slope_rate":
        return rate
    if table == "query_decay":
        return torch.exp(-rate * position)
    if table == "key_decay":
        return torch.exp(-rate * (BLOCK_SIZE - position))
    distance = rate * (position - position.T)[None, None]
    return torch.exp(torch.where(distance >= 0, -distance, -torch.inf))


FAMILY = Family(
    derived=derived,
    name="minimax", architecture="MiniMaxForCausalLM", to_model=to_model, to_hf=to_hf, layer=layer, limits=limits,
    renames=((r"\.mlp\.(gate\.|experts\.)", r".block_sparse_moe.\1"),),
    ignored=(r"\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$",),
)
