"""DeepSeek-V3 and V3.2, GLM-5: multi-head latent attention, with an indexer (DSA) from V3.2 on, sigmoid-routed experts.

MTP layers stand behind the last one. GLM-5 rotates index heads in interleaved pairs and lets layers share the
selection of an earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.interop import config_fields, key_rules
from hybridlm.interop.family import Family, HFConfig
from hybridlm.interop.mapping import Rule
from hybridlm.model.config import MixerConfig, ModelConfig
from hybridlm.model.mixers import MLAConfig


def mtp_layers(hf: HFConfig) -> list[int]:
    """Numbers of the MTP layers the checkpoint holds."""
    found = {int(m[1]) for key in hf.keys if (m := re.match(r"model\.layers\.(\d+)\.eh_proj\.weight$", key))}
    return sorted(i for i in found if i >= hf.num_hidden_layers)


def dense_types(hf: HFConfig) -> list[str]:
    listed = getattr(hf.object, "mlp_layer_types", None)
    return listed or ["dense" if i < hf.first_k_dense_replace else "sparse" for i in range(hf.num_hidden_layers)]


def v3_to_model(hf: HFConfig) -> dict[str, Any]:
    kind = "interleaved" if hf.rope_interleave else "half"
    full = config_fields.mla_model(hf, config_fields.rope_model(hf, kind))
    return config_fields.base_model(hf, ["full"] * hf.num_hidden_layers, {"full": full},
                            config_fields.deepseek_moe_model(hf, dense_types(hf)), mtp={"depth": len(mtp_layers(hf))})


def v3_to_hf(config: ModelConfig) -> dict[str, Any]:
    mla = config_fields.the(config, MLAConfig)
    moe = config_fields.deepseek_moe_hf(config_fields.moe_of(config))
    return config_fields.base_hf(config) | config_fields.mla_hf(mla) | moe | {
        "model_type": "deepseek_v3", "rope_parameters": config_fields.rope_hf(mla.rope), "rope_theta": mla.rope.theta,
        "rope_interleave": mla.rope.kind == "interleaved", "first_k_dense_replace": config_fields.leading_dense(config),
        "num_nextn_predict_layers": config.mtp.depth,
    }


def dsa_to_model(hf: HFConfig, rope_kind: str, index_kinds: list[str]) -> dict[str, Any]:
    """MLA with an indexer in every layer; `index_kinds` says of each whether it has its own ("full") or shares."""
    hf.only("mlp_bias", False)
    rope = config_fields.rope_model(hf, "interleaved")
    indexer = {"num_heads": hf.index_n_heads, "head_dim": hf.index_head_dim, "topk": hf.index_topk,
               "rope_kind": rope_kind}
    mixers = {"dsa": config_fields.mla_model(hf, rope, indexer=indexer),
              "dsa_shared": config_fields.mla_model(hf, rope, indexer=indexer | {"share": True})}
    layers = ["dsa" if kind == "full" else "dsa_shared" for kind in index_kinds]
    return config_fields.base_model(hf, layers, mixers, config_fields.deepseek_moe_model(hf, dense_types(hf)),
                            mtp=_dsa_mtp(hf))


def _dsa_mtp(hf: HFConfig) -> dict[str, Any]:
    numbers = mtp_layers(hf)
    return {"depth": len(numbers), "mixer": "dsa"} if numbers else {}


def v32_to_model(hf: HFConfig) -> dict[str, Any]:
    return dsa_to_model(hf, "half", ["full"] * hf.num_hidden_layers)


def glm_to_model(hf: HFConfig) -> dict[str, Any]:
    return dsa_to_model(hf, "interleaved", list(hf.indexer_types))


def dsa_to_hf(config: ModelConfig) -> dict[str, Any]:
    mla = config_fields.the(config, MLAConfig)
    if mla.indexer is None:
        raise ConfigError("mixers.indexer", "is missing, but the format has one in every layer")
    return v3_to_hf(config) | {
        "model_type": "deepseek_v32", "index_n_heads": mla.indexer.num_heads, "index_head_dim": mla.indexer.head_dim,
        "index_topk": mla.indexer.topk, "layer_types": ["indexed_attention"] * config.num_layers,
        "mlp_layer_types": config_fields.mlp_layer_types(config), "mlp_bias": False,
    }


def glm_to_hf(config: ModelConfig) -> dict[str, Any]:
    mixers = [config.mixers[name] for name in config.layers()]
    shared = [isinstance(m, MLAConfig) and m.indexer is not None and m.indexer.share for m in mixers]
    return dsa_to_hf(config) | {"model_type": "glm_moe_dsa",
                                "indexer_types": ["shared" if share else "full" for share in shared]}


def layer(config: ModelConfig, mixer: MixerConfig, moe: bool, o: str, t: str) -> Iterator[Rule]:
    yield from key_rules.norms(o, t)
    yield from key_rules.mla_rules(key_rules.mixer_of(mixer, MLAConfig), f"{o}mixer.", f"{t}self_attn.")
    yield from key_rules.feed_forward_rules(config.feed_forward, moe, o, t)


KIMI_K2 = ((r"^language_model\.(model|lm_head)\.", r"\1."), (r"^model\.language_model\.", "model."))

V3 = Family(name="deepseek_v3", architecture="DeepseekV3ForCausalLM", to_model=v3_to_model, to_hf=v3_to_hf, layer=layer,
            aliases=("kimi_k2",), text_of=("kimi_k25",), renames=KIMI_K2, mtp="layers",
            ignored=(r"^(model\.)?(vision_tower|mm_projector|multi_modal_projector)\.",))
V32 = Family(name="deepseek_v32", architecture="DeepseekV32ForCausalLM", to_model=v32_to_model, to_hf=dsa_to_hf,
             layer=layer, mtp="layers")
GLM = Family(name="glm_moe_dsa", architecture="GlmMoeDsaForCausalLM", to_model=glm_to_model, to_hf=glm_to_hf,
             layer=layer, mtp="layers")
