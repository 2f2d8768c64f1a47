"""OLMo-Hybrid: Gated DeltaNet with negative eigenvalues (norm before the branch) and softmax attention (norm after it).

When transformers saves, it names the norm after attention as if the layer were linear, and cuts the three
convolutions of a layer into thirds of their concatenation, whatever the widths of q, k and v are. Both are read, and
the released form is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.interop import config_fields, key_rules
from hybridlm.interop.family import Family, HFConfig
from hybridlm.interop.mapping import Chain, Each, Layout, Reshape, Rows, Rule
from hybridlm.model.config import MixerConfig, ModelConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig

NAMES = {"linear_attention": "gdn", "full_attention": "full"}


def to_model(hf: HFConfig) -> dict[str, Any]:
    gdn = {"kind": "delta_rule", "decay": "scalar", "gate": "softplus", "output_gate": "silu", "norm_eps": 1e-5,
           "num_heads": hf.linear_num_key_heads, "num_value_heads": hf.linear_num_value_heads,
           "head_dim": hf.linear_key_head_dim, "value_head_dim": hf.linear_value_head_dim,
           "conv_size": hf.linear_conv_kernel_dim, "beta_scale": 2.0 if hf.linear_allow_neg_eigval else 1.0,
           "a_init": [max(hf.linear_a_log_min, 1e-4), hf.linear_a_log_max], "dt_bias_init": "inverse_softplus",
           "dt_init": [hf.linear_dt_min, hf.linear_dt_max], "residual": {"form": "pre"}}
    rotated = (hf.rope_parameters or {}).get("rope_theta") is not None
    bias = bool(hf.attention_bias)
    rope = config_fields.rope_model(hf) if rotated else {"kind": "none"}
    full = config_fields.attention_model(hf, rope, qk_norm="full", qkv_bias=bias, o_bias=bias,
                                         residual={"form": "post"})
    dense = {"kind": "dense", "intermediate_size": hf.intermediate_size}
    return config_fields.base_model(hf, [NAMES[kind] for kind in hf.layer_types], {"gdn": gdn, "full": full}, dense)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    gdn, full = config_fields.the(config, DeltaRuleConfig), config_fields.the(config, AttentionConfig)
    nope = full.rope.kind == "none"
    return config_fields.base_hf(config) | config_fields.attention_hf(full) | {
        "model_type": "olmo_hybrid", "intermediate_size": config_fields.dense_of(config).intermediate_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": None} if nope else config_fields.rope_hf(full.rope),
        "attention_bias": full.qkv_bias, "layer_types": config_fields.layer_types(config),
        "linear_num_key_heads": gdn.num_heads, "linear_num_value_heads": gdn.value_heads,
        "linear_key_head_dim": gdn.head_dim, "linear_value_head_dim": gdn.value_dim,
        "linear_conv_kernel_dim": gdn.conv_size, "linear_allow_neg_eigval": gdn.beta_scale == 2.0,
        "linear_use_gate": True,
    }


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    ours = f"{o}mixer."
    if isinstance(mixer, AttentionConfig):
        yield _norm(f"{o}mixer", t, "post_attention_layernorm", "feedforward_layer_norm")
        yield _norm(f"{o}feed_forward", t, "post_feedforward_layernorm")
        yield from key_rules.attention_rules(mixer, ours, f"{t}self_attn.")
    else:
        gdn, theirs = key_rules.mixer_of(mixer, DeltaRuleConfig), f"{t}linear_attn."
        yield _norm(f"{o}mixer", t, "attention_layer_norm", "input_layernorm")
        yield _norm(f"{o}feed_forward", t, "feedforward_layer_norm", "post_attention_layernorm")
        yield from key_rules.same(ours, theirs, *(f"{name}_proj.weight" for name in "qkvabgo"), "A_log", "dt_bias",
                              "o_norm.weight")
        yield from _conv_rules(gdn, ours, theirs)
    yield from key_rules.feed_forward_rules(config.feed_forward, moe, o, t)


def _norm(branch: str, t: str, *names: str) -> Rule:
    """The norm of a branch under its released name, or as transformers calls it at run time or when it saves."""
    return Rule((f"{branch}_norm.weight",), tuple(Layout((f"{t}{name}.weight",)) for name in names))


def _conv_rules(gdn: DeltaRuleConfig, o: str, t: str) -> Iterator[Rule]:
    widths, taps = tuple(gdn.channels.values()), gdn.conv_size
    for found in key_rules.conv_rules(gdn, o, t):
        shapes = Each(tuple(Reshape((width, taps), (width, 1, taps)) for width in widths))
        third = -(-sum(widths) // 3)  # as torch.chunk cuts
        thirds = Chain(Rows(widths, (third, third, sum(widths) - 2 * third)), shapes)
        yield Rule(found.ours, (*found.layouts, Layout(found.layouts[0].names, thirds)))


FAMILY = Family(name="olmo_hybrid", architecture="OlmoHybridForCausalLM", to_model=to_model, to_hf=to_hf, layer=layer)
