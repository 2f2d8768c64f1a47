"""Nemotron-H: every layer is Mamba-2, softmax attention without positions, or a squared ReLU, alone.

Its mixtures of experts (Nemotron 3) have experts without gates, which hybridlm does not have: they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.interop.families.common.config_fields import (
    find_mixer,
    read_attention,
    read_backbone,
    read_steps,
    write_attention,
    write_backbone,
)
from hybridlm.interop.families.common.key_rules import map_attention, map_mamba2, rename_tensors, require_kind
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.tensor_rules import TensorRule
from hybridlm.model.config import ModelConfig
from hybridlm.model.feed_forward import SquaredReLUConfig
from hybridlm.model.mixers import AttentionConfig, Mamba2Config

MIXER_NAMES = {"linear_attention": "mamba2", "full_attention": "full", "mlp": "no_mixer"}


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    hf.require_value("mlp_hidden_act", "relu2")
    hf.require_value("mamba_hidden_act", "silu")
    for name in ("mlp_bias", "attention_bias"):
        hf.require_value(name, False)
    hf.require_value("num_nextn_predict_layers", 0)
    unknown = sorted(set(hf.layers_block_type) - set(MIXER_NAMES))
    if unknown:
        raise ConfigError("config.json: layers_block_type", "asks for layers hybridlm does not have", got=unknown,
                          expected=f"some of {sorted(MIXER_NAMES)}")
    mamba2 = {"kind": "mamba2", "num_heads": hf.mamba_num_heads, "head_dim": hf.mamba_head_dim,
              "state_size": hf.ssm_state_size, "num_groups": hf.n_groups, "conv_size": hf.conv_kernel,
              "conv_bias": bool(hf.use_conv_bias), "bias": bool(hf.use_bias),
              **read_steps(hf.time_step_min, None)}  # transformers clamps at the range of the start
    full = read_attention(hf, {"kind": "none"}, qk_norm="none")
    layers = [MIXER_NAMES[kind] for kind in hf.layers_block_type]
    data = read_backbone(hf, layers, {"mamba2": mamba2, "full": full, "no_mixer": {"kind": "none"}},
                         {"kind": "squared_relu", "intermediate_size": hf.intermediate_size})
    data["schedule"]["alone"] = [name for name in ("mamba2", "full") if name in data["mixers"]]
    return data


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    feed_forward = config.feed_forward
    if not isinstance(feed_forward, SquaredReLUConfig):
        raise ConfigError("feed_forward.kind", "does not fit the format", got=feed_forward.kind,
                          expected="squared_relu")
    types = [_layer_type(config, name) for name in config.layers()]
    fields = write_backbone(config) | {
        "model_type": "nemotron_h", "layers_block_type": types, "mlp_hidden_act": "relu2", "mlp_bias": False,
        "intermediate_size": feed_forward.intermediate_size, "mamba_hidden_act": "silu",
        "attention_bias": False, "num_nextn_predict_layers": 0}
    if (full := find_mixer(config, AttentionConfig)) is not None:
        fields |= write_attention(full)
    if (mamba2 := find_mixer(config, Mamba2Config)) is not None:
        fields |= {"mamba_num_heads": mamba2.num_heads, "mamba_head_dim": mamba2.head_dim,
                   "ssm_state_size": mamba2.state_size, "n_groups": mamba2.num_groups, "conv_kernel": mamba2.conv_size,
                   "use_conv_bias": mamba2.conv_bias, "use_bias": mamba2.bias, "time_step_min": mamba2.dt_min}
    return fields


def _layer_type(config: ModelConfig, name: str) -> str:
    """The type of the layers of a mixer."""
    if not config.mixers[name].is_branch:
        return "mlp"
    return "linear_attention" if config.mixers[name].is_linear else "full_attention"


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    theirs = f"{layer.theirs}mixer."
    if not layer.mixer.is_branch:
        yield from rename_tensors(layer.ours, layer.theirs, ("feed_forward_norm.weight", "norm.weight"))
        yield from rename_tensors(f"{layer.ours}feed_forward.", theirs, "up_proj.weight", "down_proj.weight")
        return
    yield from rename_tensors(layer.ours, layer.theirs, ("mixer_norm.weight", "norm.weight"))
    if isinstance(layer.mixer, AttentionConfig):
        yield from map_attention(layer.mixer, f"{layer.ours}mixer.", theirs)
    else:
        yield from map_mamba2(require_kind(layer.mixer, Mamba2Config), f"{layer.ours}mixer.", theirs)


FAMILY = register_family(Family(
    name="nemotron_h", architecture="NemotronHForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer, embedding_key="backbone.embeddings.weight", norm_key="backbone.norm_f.weight",
    layers_key="backbone.layers", renamed_keys=((r"^model\.", "backbone."),),
))
