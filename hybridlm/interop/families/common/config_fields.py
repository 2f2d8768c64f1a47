"""Fields of config.json that several families have: `read_*` gives plain data of our config, `write_*` the reverse.

`require_*` and `list_*` ask a config of ours for what such a format needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hybridlm.errors import ConfigError
from hybridlm.interop.family import HFConfig
from hybridlm.model.config import ModelConfig
from hybridlm.model.feed_forward.dense import DenseConfig
from hybridlm.model.feed_forward.moe import MoEConfig
from hybridlm.model.mixers import AttentionConfig, MLAConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.rope import RopeConfig, YarnConfig

Kind = TypeVar("Kind", bound=MixerConfig)
DEFAULT_POSITIONS = 4096  # of models without a longest position


def shortest_schedule(names: Sequence[str]) -> dict[str, Any]:
    """The schedule with the shortest pattern that gives these layers.

    >>> shortest_schedule(["kda", "full", "kda", "full", "kda"])
    {'pattern': ['kda', 'full']}
    """
    for period in range(1, len(names) + 1):
        if all(name == names[i % period] for i, name in enumerate(names)):
            return {"pattern": list(names[:period])}
    return {"pattern": list(names)}


def read_base(hf: HFConfig, layers: Sequence[str], mixers: dict[str, dict], feed_forward: dict, *,
              activations: Sequence[str] = ("silu",), **more: Any) -> dict[str, Any]:
    """Plain data of a whole model config from the fields that every family has.

    Args:
        hf: their config.
        layers: the mixer of each layer.
        mixers: plain data of mixers by name; those that no layer uses are left out.
        feed_forward: plain data of the feed-forward.
        activations: values of `hidden_act` that the family can have.
        more: further fields of `ModelConfig`.
    """
    hf.require_value("hidden_act", *activations)
    used = {*layers, (more.get("mtp") or {}).get("mixer")}
    return {
        "vocab_size": hf.vocab_size, "hidden_size": hf.hidden_size, "num_layers": hf.num_hidden_layers,
        "schedule": shortest_schedule(layers),
        "mixers": {name: mixer for name, mixer in mixers.items() if name in used},
        "feed_forward": feed_forward, "norm": more.pop("norm", None) or {"eps": hf.rms_norm_eps},
        "max_position": more.pop("max_position", None) or hf.max_position_embeddings,
        "tie_embeddings": bool(hf.tie_word_embeddings),
        "init_std": hf.initializer_range, "name": hf.model_type,
    } | more


def write_base(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that every family has; token ids are null: defaults may exceed the vocabulary."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "hidden_act": "silu", "rms_norm_eps": config.norm.eps, "max_position_embeddings": config.max_position,
        "initializer_range": config.init_std, "tie_word_embeddings": config.tie_embeddings, "use_cache": True,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }


def read_backbone(hf: HFConfig, layers: Sequence[str], mixers: dict[str, dict],
                  feed_forward: dict) -> dict[str, Any]:
    """Plain data of a model config from the fields of models that call their layers a backbone (Mamba, Nemotron-H).

    They name the eps of norms `layer_norm_epsilon`, and may have no longest position.
    """
    positions = getattr(hf.config, "max_position_embeddings", None)
    return read_base(hf, layers, mixers, feed_forward, norm={"eps": hf.layer_norm_epsilon},
                     max_position=DEFAULT_POSITIONS if positions is None else positions)


def write_backbone(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_backbone` reads."""
    fields = write_base(config)
    return {"layer_norm_epsilon": fields.pop("rms_norm_eps"), "residual_in_fp32": True} | fields


def read_steps(low: float, high: float | None) -> dict[str, Any]:
    """Plain data of the bounds of Mamba-2's steps, of which infinity is none."""
    return {"dt_min": float(low), "dt_max": None if high is None or math.isinf(high) else float(high)}


def find_mixer(config: ModelConfig, kind: type[Kind]) -> Kind | None:
    """The first mixer in the schedule with this config class; None where no layer has such a mixer."""
    mixers = (config.mixers[name] for name in config.layers())
    return next((mixer for mixer in mixers if isinstance(mixer, kind)), None)


def require_mixer(config: ModelConfig, kind: type[Kind]) -> Kind:
    """The first mixer in the schedule with this config class.

    Raises:
        ConfigError: no layer has such a mixer.
    """
    if (mixer := find_mixer(config, kind)) is not None:
        return mixer
    wanted = kind.kind  # type: ignore[misc]  # every kind has a default
    raise ConfigError("schedule", "has no layer that the format needs", expected=f"a mixer with kind={wanted}")


def list_layer_types(config: ModelConfig) -> list[str]:
    """The `layer_types` of a hybrid: linear or full attention per layer."""
    return ["linear_attention" if config.mixers[name].is_linear else "full_attention" for name in config.layers()]


def list_mlp_layer_types(config: ModelConfig) -> list[str]:
    """The `mlp_layer_types`: dense or sparse per layer."""
    return ["sparse" if config.feed_forward.is_moe(index) else "dense" for index in range(config.num_layers)]


def count_leading_dense(config: ModelConfig) -> int:
    """The number of layers before the first one with a mixture of experts."""
    moe_layers = [index for index in range(config.num_layers) if config.feed_forward.is_moe(index)]
    return moe_layers[0] if moe_layers else config.num_layers


def read_rope(hf: HFConfig, kind: str = "half", *, partial: bool = False) -> dict[str, Any]:
    """Our `rope` from `rope_parameters`.

    Args:
        hf: their config.
        kind: how dimensions are paired, half or interleaved.
        partial: transformers applies partial_rotary_factor in this family.

    Raises:
        ConfigError: a scaling other than YaRN.
    """
    rope = read_rope_fields(hf, hf.rope_parameters or {}, kind)
    factor = (hf.rope_parameters or {}).get("partial_rotary_factor")
    return rope | {"partial_rotary_factor": float(factor)} if partial and factor is not None else rope


def read_rope_fields(hf: HFConfig, params: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Our `rope` from one set of fields of `rope_parameters`, without a factor of rotated dims.

    Args:
        hf: their config.
        params: the fields.
        kind: how dimensions are paired, half or interleaved.

    Raises:
        ConfigError: a scaling other than YaRN.
    """
    rope_type = params.get("rope_type", "default")
    rope = {"kind": kind, "theta": float(params["rope_theta"])}
    if rope_type == "yarn":
        factor = params.get("factor") or hf.max_position_embeddings / params["original_max_position_embeddings"]
        rope["scaling"] = {
            "factor": factor, "original_max_position": params["original_max_position_embeddings"],
            "beta_fast": params.get("beta_fast") or 32, "beta_slow": params.get("beta_slow") or 1,
            "truncate": params.get("truncate", True),
            **{key: params[key] for key in ("mscale", "mscale_all_dim", "attention_factor") if params.get(key)},
        }
    elif rope_type != "default":
        raise ConfigError("config.json: rope_parameters.rope_type", "asks for a scaling hybridlm does not have",
                          got=rope_type, expected="default or yarn")
    return rope


def write_rope(rope: RopeConfig, *, partial: bool = False) -> dict[str, Any]:
    """The fields of config.json for our `rope`: `rope_parameters`, and the same as transformers 4 names it.

    vLLM, SGLang and converters of that age read `rope_theta`, `rope_scaling` and `partial_rotary_factor`, and take a
    default where one is missing.

    Args:
        rope: how positions are rotated.
        partial: transformers applies partial_rotary_factor in this family.

    >>> write_rope(RopeConfig(theta=1e6))["rope_theta"]
    1000000.0
    """
    params: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if partial:
        params["partial_rotary_factor"] = fields["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.scaling is not None:
        params |= write_yarn(rope.scaling)
        fields["rope_scaling"] = {"type": "yarn", **params}
    return fields | {"rope_parameters": params}


def write_yarn(yarn: YarnConfig) -> dict[str, Any]:
    """The fields of `rope_parameters` for YaRN."""
    optional = {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim, "attention_factor": yarn.attention_factor}
    return {"rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
            "original_max_position_embeddings": yarn.original_max_position, "truncate": yarn.truncate,
            **{key: value for key, value in optional.items() if value is not None}}


def read_mla(hf: HFConfig, rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Make plain data of MLA as in DeepSeek-V3: the norms of the latents have eps 1e-6 whatever `rms_norm_eps` says."""
    return {
        "kind": "mla", "num_heads": hf.num_attention_heads, "kv_lora_rank": hf.kv_lora_rank,
        "q_lora_rank": getattr(hf.config, "q_lora_rank", None), "qk_nope_head_dim": hf.qk_nope_head_dim,
        "qk_rope_head_dim": hf.qk_rope_head_dim, "v_head_dim": hf.v_head_dim, "rope": rope, "norm_eps": 1e-6,
        "bias": bool(hf.attention_bias),
    } | more


def write_mla(mla: MLAConfig) -> dict[str, Any]:
    """The fields of MLA."""
    return {
        "num_attention_heads": mla.num_heads, "num_key_value_heads": mla.num_heads, "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank, "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim, "v_head_dim": mla.v_head_dim, "attention_bias": mla.bias,
        "attention_dropout": 0.0,
    }


def read_attention(hf: HFConfig, rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Make plain data of softmax attention; `more` are further fields."""
    heads = hf.num_attention_heads
    return {"kind": "attention", "num_heads": heads, "num_kv_heads": hf.num_key_value_heads,
            "head_dim": getattr(hf.config, "head_dim", None) or hf.hidden_size // heads, "rope": rope} | more


def write_attention(attention: AttentionConfig) -> dict[str, Any]:
    """The fields of softmax attention."""
    return {"num_attention_heads": attention.num_heads, "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim, "attention_dropout": 0.0}


def read_deepseek_moe(hf: HFConfig, types: Sequence[str]) -> dict[str, Any]:
    """Make plain data of the mixture of experts of DeepSeek-V3; the correction bias stays as it was trained.

    Args:
        hf: their config.
        types: `mlp_layer_types`.
    """
    return {
        "kind": "moe", "router": "sigmoid", "correction_bias": True, "num_experts": hf.num_local_experts,
        "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.moe_intermediate_size,
        "num_shared_experts": hf.n_shared_experts or 0, "intermediate_size": hf.intermediate_size,
        "dense_layers": [i for i, kind in enumerate(types) if kind == "dense"],
        "norm_topk_prob": bool(hf.norm_topk_prob), "routed_scaling_factor": hf.routed_scaling_factor,
        "num_groups": hf.n_group or 1, "topk_groups": hf.topk_group or 1,
    }


def require_moe(config: ModelConfig) -> MoEConfig:
    """The mixture of experts of a model.

    Raises:
        ConfigError: the model has none.
    """
    if not isinstance(config.feed_forward, MoEConfig):
        raise ConfigError("feed_forward.kind", "does not fit the format", got=config.feed_forward.kind, expected="moe")
    return config.feed_forward


def require_dense(config: ModelConfig) -> DenseConfig:
    """The dense feed-forward of a model.

    Raises:
        ConfigError: the model has another.
    """
    if not isinstance(config.feed_forward, DenseConfig):
        raise ConfigError("feed_forward.kind", "does not fit the format", got=config.feed_forward.kind,
                          expected="dense")
    return config.feed_forward


def write_deepseek_moe(moe: MoEConfig) -> dict[str, Any]:
    """The fields of a mixture of experts, as DeepSeek names them."""
    return {
        "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size, "n_shared_experts": moe.num_shared_experts,
        "intermediate_size": moe.intermediate_size or moe.moe_intermediate_size, "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor, "n_group": moe.num_groups, "topk_group": moe.topk_groups,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
    }
