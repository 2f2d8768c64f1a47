"""What a model computes, as plain data without names, defaults and training options: two configs that agree here are
one model. An export writes a config.json, reads it back, and says what got lost."""

from __future__ import annotations

from typing import Any

from hybridlm.config.serialization import to_dict
from hybridlm.model.config import ModelConfig
from hybridlm.model.feed_forward.contract import FeedForwardConfig
from hybridlm.model.feed_forward.moe import MoEConfig
from hybridlm.model.mixers import AttentionConfig, MLAConfig
from hybridlm.model.mixers.common.recurrent import RecurrentConfig
from hybridlm.model.mixers.contract import MixerConfig

# Fields that say how weights start or are trained, not what is computed from them.
INITIAL = ("a_init", "dt_bias_init", "dt_init")
TRAINED = ("bias_update_rate", "balance_loss", "router_z_loss")


def canonical(config: ModelConfig) -> dict[str, Any]:
    """Everything that the logits depend on, layer by layer."""
    layers = [_layer(config, config.mixers[name], index) for index, name in enumerate(config.layers())]
    mtp = [_layer(config, config.mixers[config.mtp.mixer or config.layers()[-1]], config.num_layers - 1)
           for _ in range(config.mtp.depth)]
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_layers": config.num_layers,
        "norm": to_dict(config.norm), "tie_embeddings": config.tie_embeddings,
        "logit_soft_cap": config.logit_soft_cap, "layers": layers, "mtp": mtp,
    }


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(path, value in a, value in b) wherever two plain data differ; a key one side lacks counts as null."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [(path, a, b)]


def _layer(config: ModelConfig, mixer: MixerConfig, index: int) -> dict[str, Any]:
    residual = config.feed_forward.residual or mixer.residual
    return {"mixer": _mixer(config, mixer), "residual": to_dict(residual),
            "feed_forward": _feed_forward(config, config.feed_forward, index)}


def _mixer(config: ModelConfig, mixer: MixerConfig) -> dict[str, Any]:
    data = to_dict(mixer)
    for key in INITIAL:
        data.pop(key, None)
    if "norm_eps" in data and data["norm_eps"] is None:
        data["norm_eps"] = config.norm.eps
    if isinstance(mixer, AttentionConfig):
        data["num_kv_heads"] = mixer.kv_heads
        data["qk_norm_eps"] = None if mixer.qk_norm == "none" else mixer.qk_norm_eps or config.norm.eps
    elif isinstance(mixer, RecurrentConfig):
        _recurrent(mixer, data)
    if isinstance(mixer, AttentionConfig | MLAConfig):
        _rope(data)
        _indexer(mixer, data)
    return data


def _recurrent(mixer: RecurrentConfig, data: dict[str, Any]) -> None:
    data["num_value_heads"], data["value_head_dim"] = mixer.value_heads, mixer.value_dim
    if not mixer.gate_width:
        data.pop("gate", None), data.pop("gate_dtype", None)
    if mixer.gate != "lower_bounded" or not mixer.gate_width:
        data.pop("lower_bound", None)
    if mixer.gate != "logsigmoid" or not mixer.gate_width:
        data.pop("gate_normalizer", None)
    if mixer.decay != "constant":
        data.pop("slopes", None)


def _rope(data: dict[str, Any]) -> None:
    rope = data["rope"]
    if rope["kind"] == "none":
        data["rope"] = {"kind": "none"}
    elif (yarn := rope["scaling"]) is not None and yarn["attention_factor"] is not None and data["kind"] != "mla":
        yarn["mscale"] = yarn["mscale_all_dim"] = None


def _indexer(mixer: AttentionConfig | MLAConfig, data: dict[str, Any]) -> None:
    index = mixer.indexer
    if index is None:
        return
    if index.share:
        data["indexer"] = {"share": True, "mode": index.mode}
        return
    data["indexer"].pop("loss_weight")  # of training alone
    if index.rope_kind == "none":
        data["indexer"]["rope_dim"] = None
    elif index.rope_dim is None:
        data["indexer"]["rope_dim"] = mixer.qk_rope_head_dim if isinstance(mixer, MLAConfig) else mixer.index_rope_dim


def _feed_forward(config: ModelConfig, feed_forward: FeedForwardConfig, index: int) -> dict[str, Any]:
    if isinstance(feed_forward, MoEConfig):
        dense = feed_forward.dense_config(config.layer_context(index))
        if dense is None:
            data = to_dict(feed_forward)
            for key in (*TRAINED, "dense_layers", "intermediate_size", "residual", "num_shared_experts"):
                data.pop(key)
            data["correction_bias"], data["shared_intermediate_size"] = feed_forward.has_bias, feed_forward.shared_width
            if feed_forward.topk_groups == feed_forward.num_groups:
                data["num_groups"] = data["topk_groups"] = 1
            return data
        feed_forward = dense
    data = to_dict(feed_forward)
    data.pop("residual")
    return data
