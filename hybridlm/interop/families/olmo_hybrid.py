"""OLMo-Hybrid: Gated DeltaNet with negative eigenvalues (norm before the branch) and softmax attention (norm after it).

When transformers saves, it names the norm after attention as if the layer were linear, and cuts the three
convolutions of a layer into thirds of their concatenation, whatever the widths of q, k and v are. Both are read, and
the released form is written.
"""

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
from hybridlm.interop.families.common.key_rules import (
    map_attention,
    map_convolutions,
    map_feed_forward,
    rename_tensors,
    require_kind,
)
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.rearrangements import Chain, PerTensor, RecutRows, Reshape
from hybridlm.interop.tensor_rules import KeyLayout, TensorRule
from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig

MIXER_NAMES = {"linear_attention": "gdn", "full_attention": "full"}


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    gdn = {"kind": "delta_rule", "decay": "scalar", "gate": "softplus", "output_gate": "silu", "norm_eps": 1e-5,
           "num_heads": hf.linear_num_key_heads, "num_value_heads": hf.linear_num_value_heads,
           "head_dim": hf.linear_key_head_dim, "value_head_dim": hf.linear_value_head_dim,
           "conv_size": hf.linear_conv_kernel_dim, "beta_scale": 2.0 if hf.linear_allow_neg_eigval else 1.0,
           "a_init": [max(hf.linear_a_log_min, 1e-4), hf.linear_a_log_max], "dt_bias_init": "inverse_softplus",
           "dt_init": [hf.linear_dt_min, hf.linear_dt_max], "residual": {"form": "pre"}}
    rotated = (hf.rope_parameters or {}).get("rope_theta") is not None
    bias = bool(hf.attention_bias)
    rope = read_rope(hf) if rotated else {"kind": "none"}
    full = read_attention(hf, rope, qk_norm="full", qkv_bias=bias, o_bias=bias, residual={"form": "post"})
    dense = {"kind": "dense", "intermediate_size": hf.intermediate_size}
    layers = [MIXER_NAMES[kind] for kind in hf.layer_types]
    return read_base(hf, layers, {"gdn": gdn, "full": full}, dense)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    gdn = require_mixer(config, DeltaRuleConfig)
    full = require_mixer(config, AttentionConfig)
    without_rope = {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
    return write_base(config) | write_attention(full) | {
        "model_type": "olmo_hybrid", "intermediate_size": require_dense(config).intermediate_size,
        **(without_rope if full.rope.kind == "none" else write_rope(full.rope)),
        "attention_bias": full.qkv_bias, "layer_types": list_layer_types(config),
        "linear_num_key_heads": gdn.num_heads, "linear_num_value_heads": gdn.value_heads,
        "linear_key_head_dim": gdn.head_dim, "linear_value_head_dim": gdn.value_dim,
        "linear_conv_kernel_dim": gdn.conv_size, "linear_allow_neg_eigval": gdn.beta_scale == 2.0,
        "linear_use_gate": True,
    }


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    ours = f"{layer.ours}mixer."
    if isinstance(layer.mixer, AttentionConfig):
        yield _map_norm(layer, "mixer", "post_attention_layernorm", "feedforward_layer_norm")
        yield _map_norm(layer, "feed_forward", "post_feedforward_layernorm")
        yield from map_attention(layer.mixer, ours, f"{layer.theirs}self_attn.")
    else:
        gdn = require_kind(layer.mixer, DeltaRuleConfig)
        theirs = f"{layer.theirs}linear_attn."
        yield _map_norm(layer, "mixer", "attention_layer_norm", "input_layernorm")
        yield _map_norm(layer, "feed_forward", "feedforward_layer_norm", "post_attention_layernorm")
        yield from rename_tensors(ours, theirs, *(f"{name}_proj.weight" for name in "qkvabgo"), "A_log", "dt_bias",
                                  "o_norm.weight")
        yield from _map_convolutions(gdn, ours, theirs)
    yield from map_feed_forward(config, layer)


def _map_norm(layer: LayerToMap, branch: str, *names: str) -> TensorRule:
    """The rule for the norm of a branch: its released name first, then those of transformers at run time or on disk."""
    layouts = tuple(KeyLayout((f"{layer.theirs}{name}.weight",)) for name in names)
    return TensorRule((f"{layer.ours}{branch}_norm.weight",), layouts)


def _map_convolutions(gdn: DeltaRuleConfig, ours: str, theirs: str) -> Iterator[TensorRule]:
    """Yield rules for the convolutions, which may also come cut into thirds."""
    widths = tuple(gdn.channels.values())
    reshapes = PerTensor(tuple(Reshape((width, gdn.conv_size), (width, 1, gdn.conv_size)) for width in widths))
    third = -(-sum(widths) // 3)  # torch.chunk rounds up
    thirds = Chain(RecutRows(widths, (third, third, sum(widths) - 2 * third)), reshapes)
    for rule in map_convolutions(gdn, ours, theirs):
        yield TensorRule(rule.ours, (*rule.layouts, KeyLayout(rule.layouts[0].names, thirds)))


FAMILY = register_family(Family(
    name="olmo_hybrid", architecture="OlmoHybridForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer,
))
