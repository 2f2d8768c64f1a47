"""Falcon-H1: softmax attention beside Mamba-2 on one norm, and a SwiGLU, in every layer, with fixed multipliers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

from hybridlm.errors import ConfigError
from hybridlm.interop.families.common.config_fields import (
    read_attention,
    read_base,
    read_rope,
    read_steps,
    require_dense,
    require_mixer,
    write_attention,
    write_base,
    write_rope,
)
from hybridlm.interop.families.common.key_rules import (
    map_attention,
    map_mamba2,
    map_swiglu,
    rename_tensors,
    require_kind,
)
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.tensor_rules import TensorRule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig, Mamba2Config, ParallelConfig
from hybridlm.model.mixers.contract import MixerConfig

ATTENTION, SSM = "attention", "ssm"  # names of the branches
NO_SCALES = [1.0] * 5  # of z, x, B, C and dt
Kind = TypeVar("Kind", bound=MixerConfig)


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    for name in ("attention_bias", "mlp_bias"):
        hf.require_value(name, False)
    hf.require_value("projectors_bias", hf.mamba_proj_bias)
    if hf.mamba_rms_norm:
        hf.require_value("mamba_norm_before_gate", False)
    ssm = {"kind": "mamba2", "num_heads": hf.mamba_n_heads, "head_dim": hf.mamba_d_head,
           "state_size": hf.mamba_d_state, "num_groups": hf.mamba_n_groups, "conv_size": hf.mamba_d_conv,
           "conv_bias": bool(hf.mamba_conv_bias), "bias": bool(hf.mamba_proj_bias),
           "norm": "gated" if hf.mamba_rms_norm else "none", **read_steps(*hf.time_step_limit)}
    if list(hf.ssm_multipliers) != NO_SCALES:
        ssm["input_scales"] = list(hf.ssm_multipliers)
    attention = read_attention(hf, read_rope(hf), qk_norm="none", key_scale=hf.key_multiplier)
    hybrid = {"kind": "parallel", "branches": {ATTENTION: attention, SSM: ssm},
              "input_scale": {ATTENTION: hf.attention_in_multiplier, SSM: hf.ssm_in_multiplier},
              "output_scale": {ATTENTION: hf.attention_out_multiplier, SSM: hf.ssm_out_multiplier}}
    gate, down = hf.mlp_multipliers
    dense = {"kind": "dense", "intermediate_size": hf.intermediate_size, "gate_scale": gate,
             "residual": {"beta": down}}
    return read_base(hf, ["hybrid"] * hf.num_hidden_layers, {"hybrid": hybrid}, dense,
                     embedding_scale=hf.embedding_multiplier, logit_scale=hf.lm_head_multiplier)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    hybrid = require_mixer(config, ParallelConfig)
    attention, ssm = _branch(hybrid, ATTENTION, AttentionConfig), _branch(hybrid, SSM, Mamba2Config)
    dense = require_dense(config)
    return write_base(config) | write_attention(attention) | write_rope(attention.rope) | {
        "model_type": "falcon_h1", "intermediate_size": dense.intermediate_size, "attention_bias": False,
        "mlp_bias": False, "projectors_bias": ssm.bias, "mamba_proj_bias": ssm.bias, "mamba_n_heads": ssm.num_heads,
        "mamba_d_head": ssm.head_dim, "mamba_d_ssm": ssm.inner_size, "mamba_d_state": ssm.state_size,
        "mamba_n_groups": ssm.num_groups, "mamba_d_conv": ssm.conv_size, "mamba_conv_bias": ssm.conv_bias,
        "mamba_rms_norm": ssm.norm == "gated", "mamba_norm_before_gate": False,
        "time_step_limit": [ssm.dt_min, math.inf if ssm.dt_max is None else ssm.dt_max],
        "attention_in_multiplier": hybrid.input_scale.get(ATTENTION, 1.0),
        "ssm_in_multiplier": hybrid.input_scale.get(SSM, 1.0),
        "attention_out_multiplier": hybrid.output_scale.get(ATTENTION, 1.0),
        "ssm_out_multiplier": hybrid.output_scale.get(SSM, 1.0),
        "ssm_multipliers": ssm.input_scales or NO_SCALES, "key_multiplier": attention.key_scale,
        "mlp_multipliers": [dense.gate_scale, 1.0 if dense.residual is None else dense.residual.beta],
        "embedding_multiplier": config.embedding_scale, "lm_head_multiplier": config.logit_multiplier,
    }


def _branch(hybrid: ParallelConfig, name: str, kind: type[Kind]) -> Kind:
    """The mixer of a branch.

    Raises:
        ConfigError: there is no branch of this name, or it is of another kind.
    """
    if name not in hybrid.branches:
        raise ConfigError("branches", "have names that do not fit the format", got=sorted(hybrid.branches),
                          expected=f"{ATTENTION} and {SSM}")
    return require_kind(hybrid.branches[name], kind)


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    hybrid = require_kind(layer.mixer, ParallelConfig)
    ours = f"{layer.ours}mixer.branches."
    yield from rename_tensors(layer.ours, layer.theirs, ("mixer_norm.weight", "input_layernorm.weight"),
                              ("feed_forward_norm.weight", "pre_ff_layernorm.weight"))
    yield from map_attention(_branch(hybrid, ATTENTION, AttentionConfig), f"{ours}{ATTENTION}.",
                             f"{layer.theirs}self_attn.")
    yield from map_mamba2(_branch(hybrid, SSM, Mamba2Config), f"{ours}{SSM}.", f"{layer.theirs}mamba.")
    yield from map_swiglu(f"{layer.ours}feed_forward.", f"{layer.theirs}feed_forward.")


FAMILY = register_family(Family(
    name="falcon_h1", architecture="FalconH1ForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer, norm_key="model.final_layernorm.weight",
))
