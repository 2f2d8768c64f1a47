"""LFM2: gated short convolutions and softmax attention with normed heads; the final norm has a name of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop.families.common.config_fields import (
    list_layer_types,
    read_attention,
    read_base,
    read_rope,
    require_dense,
    require_mixer,
    write_attention,
    write_base,
    write_rope,
)
from hybridlm.interop.families.common.key_rules import rename_tensors, require_kind
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.rearrangements import PerTensor, Reshape
from hybridlm.interop.tensor_rules import TensorRule, map_tensors
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig, GatedConvConfig

MIXER_NAMES = {"conv": "conv", "full_attention": "full"}


def read_width(hf: HFConfig) -> int:
    """The inner width of the feed-forward, which transformers derives from `intermediate_size`."""
    width = hf.intermediate_size
    if hf.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if hf.block_ffn_dim_multiplier is not None:
            multiple = hf.block_multiple_of
            width = -(-int(hf.block_ffn_dim_multiplier * width) // multiple) * multiple
    return width


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    conv = {"kind": "gated_conv", "conv_size": hf.conv_L_cache, "bias": bool(hf.conv_bias)}
    full = read_attention(hf, read_rope(hf), qk_norm="head")
    dense = {"kind": "dense", "intermediate_size": read_width(hf)}
    layers = [MIXER_NAMES[kind] for kind in hf.layer_types]
    return read_base(hf, layers, {"conv": conv, "full": full}, dense, norm={"eps": hf.norm_eps})


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    conv = require_mixer(config, GatedConvConfig)
    full = require_mixer(config, AttentionConfig)
    fields = write_base(config) | write_attention(full) | write_rope(full.rope)
    return {key: value for key, value in fields.items() if key not in ("rms_norm_eps", "hidden_act")} | {
        "model_type": "lfm2", "norm_eps": config.norm.eps, "conv_L_cache": conv.conv_size, "conv_bias": conv.bias,
        "intermediate_size": require_dense(config).intermediate_size, "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv" if kind == "linear_attention" else kind for kind in list_layer_types(config)],
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    ours = f"{layer.ours}mixer."
    yield from rename_tensors(layer.ours, layer.theirs, ("mixer_norm.weight", "operator_norm.weight"),
                              ("feed_forward_norm.weight", "ffn_norm.weight"))
    if isinstance(layer.mixer, AttentionConfig):
        yield from rename_tensors(ours, f"{layer.theirs}self_attn.", "q_proj.weight", "k_proj.weight", "v_proj.weight",
                                  ("o_proj.weight", "out_proj.weight"), ("q_norm.weight", "q_layernorm.weight"),
                                  ("k_norm.weight", "k_layernorm.weight"))
    else:
        conv = require_kind(layer.mixer, GatedConvConfig)
        theirs = f"{layer.theirs}conv."
        for kind in ("weight", "bias") if conv.bias else ("weight",):
            yield from rename_tensors(ours, theirs, f"in_proj.{kind}", f"out_proj.{kind}")
        if conv.bias:
            yield from rename_tensors(ours, theirs, "conv.bias")
        shape = (config.hidden_size, conv.conv_size)
        yield map_tensors(f"{ours}conv.weight", f"{theirs}conv.weight",
                          PerTensor((Reshape(shape, (shape[0], 1, shape[1])),)))
    yield from rename_tensors(f"{layer.ours}feed_forward.", f"{layer.theirs}feed_forward.",
                              ("gate_proj.weight", "w1.weight"), ("up_proj.weight", "w3.weight"),
                              ("down_proj.weight", "w2.weight"))


FAMILY = register_family(Family(
    name="lfm2", architecture="Lfm2ForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer, norm_key="model.embedding_norm.weight",
))
