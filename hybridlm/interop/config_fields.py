"""Pieces of config mapping that several families share: `*_model` reads a config.json, `*_hf` writes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.interop.family import HFConfig
from hybridlm.model.config import ModelConfig
from hybridlm.model.feed_forward.dense import DenseConfig
from hybridlm.model.feed_forward.moe import MoEConfig
from hybridlm.model.mixers import AttentionConfig, MLAConfig
from hybridlm.model.mixers.common.recurrent import RecurrentConfig
from hybridlm.model.rope import RopeConfig, YarnConfig


def schedule(names: Sequence[str]) -> dict[str, Any]:
    """The shortest pattern that gives these layers."""
    for period in range(1, len(names) + 1):
        if all(name == names[i % period] for i, name in enumerate(names)):
            return {"pattern": list(names[:period])}
    return {"pattern": list(names)}


def base_model(hf: HFConfig, layers: Sequence[str], mixers: dict[str, dict], feed_forward: dict,
               **more: Any) -> dict[str, Any]:
    """A whole model config from what every family has. Mixers that no layer uses are left out."""
    hf.only("hidden_act", "silu")
    used = {*layers, (more.get("mtp") or {}).get("mixer")}
    return {
        "vocab_size": hf.vocab_size, "hidden_size": hf.hidden_size, "num_layers": hf.num_hidden_layers,
        "schedule": schedule(layers), "mixers": {name: m for name, m in mixers.items() if name in used},
        "feed_forward": feed_forward, "norm": {"eps": hf.rms_norm_eps},
        "max_position": hf.max_position_embeddings, "tie_embeddings": bool(hf.tie_word_embeddings),
        "init_std": hf.initializer_range, "name": hf.model_type,
    } | more


def base_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that every family has. Token ids are null: a default may lie outside the vocabulary."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "hidden_act": "silu", "rms_norm_eps": config.norm.eps, "max_position_embeddings": config.max_position,
        "initializer_range": config.init_std, "tie_word_embeddings": config.tie_embeddings, "use_cache": True,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }


def the(config: ModelConfig, cls: type, **values: Any) -> Any:
    """The first mixer in the schedule that is a `cls` with these values.

    Raises:
        ConfigError: no layer has such a mixer.
    """
    for name in config.layers():
        mixer = config.mixers[name]
        if isinstance(mixer, cls) and all(getattr(mixer, key) == value for key, value in values.items()):
            return mixer
    wanted = ", ".join([f"kind={cls.kind}", *(f"{key}={value}" for key, value in values.items())])  # type: ignore[attr-defined]
    raise ConfigError("schedule", "has no layer that the format needs", expected=f"a mixer with {wanted}")


def layer_types(config: ModelConfig, linear: type = RecurrentConfig) -> list[str]:
    """transformers' `layer_types` of a hybrid."""
    return ["linear_attention" if isinstance(config.mixers[name], linear) else "full_attention"
            for name in config.layers()]


def mlp_layer_types(config: ModelConfig) -> list[str]:
    return ["sparse" if config.feed_forward.is_moe(i) else "dense" for i in range(config.num_layers)]


def leading_dense(config: ModelConfig) -> int:
    """How many layers before the first MoE one."""
    return next((i for i in range(config.num_layers) if config.feed_forward.is_moe(i)), config.num_layers)


def rope_model(hf: HFConfig, kind: str = "half", partial: bool = False) -> dict[str, Any]:
    """Our `rope` from `rope_parameters`; `partial`: transformers honours partial_rotary_factor in this family."""
    params = dict(hf.rope_parameters or {})
    rope_type = params.get("rope_type", "default")
    rope = {"kind": kind, "theta": float(params["rope_theta"])}
    if partial and params.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = float(params["partial_rotary_factor"])
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


def rope_hf(rope: RopeConfig, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters` from ours."""
    params: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if partial:
        params["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.scaling is not None:
        params |= yarn_hf(rope.scaling)
    return params


def yarn_hf(yarn: YarnConfig) -> dict[str, Any]:
    optional = {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim, "attention_factor": yarn.attention_factor}
    return {"rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
            "original_max_position_embeddings": yarn.original_max_position, "truncate": yarn.truncate,
            **{key: value for key, value in optional.items() if value is not None}}


def mla_model(hf: HFConfig, rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    """MLA as in DeepSeek-V3: the norms of the latents have eps 1e-6 whatever `rms_norm_eps` says."""
    return {
        "kind": "mla", "num_heads": hf.num_attention_heads, "kv_lora_rank": hf.kv_lora_rank,
        "q_lora_rank": getattr(hf.object, "q_lora_rank", None), "qk_nope_head_dim": hf.qk_nope_head_dim,
        "qk_rope_head_dim": hf.qk_rope_head_dim, "v_head_dim": hf.v_head_dim, "rope": rope, "norm_eps": 1e-6,
        "bias": bool(hf.attention_bias),
    } | more


def mla_hf(mla: MLAConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": mla.num_heads, "num_key_value_heads": mla.num_heads, "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank, "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim, "v_head_dim": mla.v_head_dim, "attention_bias": mla.bias,
        "attention_dropout": 0.0,
    }


def attention_model(hf: HFConfig, rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    heads = hf.num_attention_heads
    return {"kind": "attention", "num_heads": heads, "num_kv_heads": hf.num_key_value_heads,
            "head_dim": getattr(hf.object, "head_dim", None) or hf.hidden_size // heads, "rope": rope} | more


def attention_hf(attention: AttentionConfig) -> dict[str, Any]:
    return {"num_attention_heads": attention.num_heads, "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim, "attention_dropout": 0.0}


def deepseek_moe_model(hf: HFConfig, types: Sequence[str]) -> dict[str, Any]:
    """Mixture of experts of DeepSeek-V3 and all that follow it; the correction bias stays as it was trained."""
    return {
        "kind": "moe", "router": "sigmoid", "correction_bias": True, "num_experts": hf.num_local_experts,
        "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.moe_intermediate_size,
        "num_shared_experts": hf.n_shared_experts or 0, "intermediate_size": hf.intermediate_size,
        "dense_layers": [i for i, kind in enumerate(types) if kind == "dense"],
        "norm_topk_prob": bool(hf.norm_topk_prob), "routed_scaling_factor": hf.routed_scaling_factor,
        "num_groups": hf.n_group or 1, "topk_groups": hf.topk_group or 1,
    }


def moe_of(config: ModelConfig) -> MoEConfig:
    """The model's mixture of experts.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(config.feed_forward, MoEConfig):
        raise ConfigError("feed_forward.kind", "does not fit the format", got=config.feed_forward.kind, expected="moe")
    return config.feed_forward


def dense_of(config: ModelConfig) -> DenseConfig:
    if not isinstance(config.feed_forward, DenseConfig):
        raise ConfigError("feed_forward.kind", "does not fit the format", got=config.feed_forward.kind,
                          expected="dense")
    return config.feed_forward


def deepseek_moe_hf(moe: MoEConfig) -> dict[str, Any]:
    """Fields as DeepSeek names them."""
    return {
        "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size, "n_shared_experts": moe.num_shared_experts,
        "intermediate_size": moe.intermediate_size or moe.moe_intermediate_size, "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor, "n_group": moe.num_groups, "topk_group": moe.topk_groups,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
    }
