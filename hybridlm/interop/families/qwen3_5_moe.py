"""Qwen3.5 MoE, the text model: Qwen3-Next with unpacked projections and renormalised experts.

Released checkpoints are of the vision-language model; its text model is read, what belongs to images is left out.
Positions are the three-axis ones of the vision-language model, which for text are ordinary positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop.families import qwen3_next
from hybridlm.interop.families.common.key_rules import (
    map_attention,
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


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    return qwen3_next.read_qwen(hf, [], norm_topk_prob=True)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    return qwen3_next.write_qwen(config) | {"model_type": "qwen3_5_moe_text"}


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    yield from map_norms(layer)
    if isinstance(layer.mixer, AttentionConfig):
        yield from map_attention(layer.mixer, f"{layer.ours}mixer.", f"{layer.theirs}self_attn.", gate_in_q=True)
    else:
        gdn = require_kind(layer.mixer, DeltaRuleConfig)
        ours = f"{layer.ours}mixer."
        theirs = f"{layer.theirs}linear_attn."
        yield map_tensors(tuple(f"{ours}{name}_proj.weight" for name in "qkv"), f"{theirs}in_proj_qkv.weight",
                          PackedRows(tuple(gdn.channels.values())))
        yield from rename_tensors(ours, theirs, ("g_proj.weight", "in_proj_z.weight"),
                                  ("b_proj.weight", "in_proj_b.weight"), ("a_proj.weight", "in_proj_a.weight"))
        yield from qwen3_next.map_gdn(gdn, ours, theirs)
    yield from map_feed_forward(config, layer, shared_name="shared_expert")


FAMILY = register_family(Family(
    name="qwen3_5_moe_text", architecture="Qwen3_5MoeForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer, preference=-1,  # qwen3_next holds these models too
    multimodal_types=("qwen3_5_moe",), mtp_keys="mtp", renamed_keys=((r"^model\.language_model\.", "model."),),
    ignored_keys=(r"^(model\.)?visual\.",),
))
