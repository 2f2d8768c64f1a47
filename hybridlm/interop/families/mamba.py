"""Mamba and Falcon-Mamba: a Mamba block alone in every layer, without a feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop.families.common.config_fields import read_backbone, require_mixer, write_backbone
from hybridlm.interop.families.common.key_rules import map_joint_conv, rename_tensors, require_kind
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.tensor_rules import TensorRule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import MambaConfig

NORMED_TYPE = "falcon_mamba"  # its step, B and C are normed without weights


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    hf.require_value("use_conv_bias", True)
    normed = hf.model_type == NORMED_TYPE
    mamba = {"kind": "mamba", "expand": hf.expand, "state_size": hf.state_size, "conv_size": hf.conv_kernel,
             "dt_rank": hf.time_step_rank, "bias": bool(hf.use_bias),
             **({"inner_norm": "plain", "norm_eps": hf.mixer_rms_eps} if normed else {})}
    return read_backbone(hf, ["mamba"] * hf.num_hidden_layers, {"mamba": mamba}, {"kind": "none"})


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of either family, by the mixer's inner norm."""
    mamba = require_mixer(config, MambaConfig)
    normed = mamba.inner_norm == "plain"
    return write_backbone(config) | {
        "model_type": NORMED_TYPE if normed else "mamba", "expand": mamba.expand, "state_size": mamba.state_size,
        "conv_kernel": mamba.conv_size, "time_step_rank": mamba.rank(config.layer_context(0)),
        "intermediate_size": mamba.inner_size(config.layer_context(0)), "use_bias": mamba.bias, "use_conv_bias": True,
        **({"mixer_rms_eps": config.norm.eps_or(mamba.norm_eps)} if normed else {}),
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    mamba = require_kind(layer.mixer, MambaConfig)
    ours, theirs = f"{layer.ours}mixer.", f"{layer.theirs}mixer."
    yield from rename_tensors(layer.ours, layer.theirs, ("mixer_norm.weight", "norm.weight"))
    yield from rename_tensors(ours, theirs, "in_proj.weight", "x_proj.weight", "dt_proj.weight",
                              ("dt_bias", "dt_proj.bias"), "A_log", "D", "out_proj.weight")
    if mamba.bias:
        yield from rename_tensors(ours, theirs, "in_proj.bias", "out_proj.bias")
    yield from map_joint_conv(ours, theirs, mamba.inner_size(config.layer_context(0)), mamba.conv_size)


def _family(name: str, architecture: str) -> Family:
    return Family(name=name, architecture=architecture, read_config=read_config, write_config=write_config,
                  map_layer=map_layer, embedding_key="backbone.embeddings.weight", norm_key="backbone.norm_f.weight",
                  layers_key="backbone.layers", renamed_keys=((r"^backbone\.embedding\.", "backbone.embeddings."),))


FAMILY = register_family(_family("mamba", "MambaForCausalLM"))
FALCON_FAMILY = register_family(_family(NORMED_TYPE, "FalconMambaForCausalLM"))
