"""DeepSeek-V4: compressed attention in three kinds of layers, four residual streams (mHC), and experts in every layer.

Names are those of the released files, which transformers writes too. Multi-token prediction is left out, as
transformers leaves it out, and so are experts in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.interop.families.common.config_fields import (
    read_base,
    read_rope_fields,
    require_moe,
    write_base,
    write_yarn,
)
from hybridlm.interop.families.common.key_rules import rename_tensors, require_kind
from hybridlm.interop.family import Family, HFConfig, LayerToMap, register_family
from hybridlm.interop.rearrangements import PerTensor, Reshape, SideBySide, StackedExperts
from hybridlm.interop.tensor_rules import KeyLayout, TensorRule, map_tensors
from hybridlm.model.config import ModelConfig
from hybridlm.model.feed_forward.moe import MoEConfig
from hybridlm.model.mixers import CompressedAttentionConfig
from hybridlm.model.residual import MHCConfig
from hybridlm.model.rope import RopeConfig

WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
MIXER_NAMES = {WINDOW: "window", SPARSE: "csa", HEAVY: "hca"}
COEFFICIENTS = (("weight", "fn"), ("base", "base"), ("scale", "scale"))
RUNTIME_KEYS = (
    (r"^model\.embed_tokens\.", "embed."), (r"^lm_head\.", "head."), (r"^model\.norm\.", "norm."),
    (r"^model\.hc_head\.hc_(fn|base|scale)$", r"hc_head_\1"), (r"^model\.layers\.", "layers."),
    (r"\.input_layernorm\.", ".attn_norm."), (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.(fn|base|scale)$", r".hc_\1_\2"), (r"\.mlp\.", ".ffn."),
    (r"\.gate\.e_score_correction_bias$", ".gate.bias"), (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."), (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.self_attn\.compressor\.indexer\.scorer\.weights_proj\.", ".attn.indexer.weights_proj."),
    (r"\.self_attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
    (r"\.self_attn\.compressor\.indexer\.", ".attn.indexer.compressor."), (r"\.self_attn\.", ".attn."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."), (r"\.compressor\.kv_proj\.", ".compressor.wkv."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."), (r"\.compressor\.position_bias$", ".compressor.ape"),
    (r"\.attn\.sinks$", ".attn.attn_sink"), (r"\.attn\.q_a_proj\.", ".attn.wq_a."),
    (r"\.attn\.q_a_norm\.", ".attn.q_norm."), (r"\.attn\.q_b_proj\.", ".attn.wq_b."),
    (r"\.attn\.kv_proj\.", ".attn.wkv."), (r"\.attn\.o_a_proj\.", ".attn.wo_a."),
    (r"\.attn\.o_b_proj\.", ".attn.wo_b."),
    (r"\.attn\.norm\.", ".attn.kv_norm."),  # as transformers saves it
)


def read_config(hf: HFConfig) -> dict[str, Any]:
    """Convert a transformers config to plain data of a `ModelConfig`."""
    for name in ("attention_bias", "mlp_bias"):
        hf.require_value(name, False)
    hf.require_value("scoring_func", "sqrtsoftplus")
    sizes = {"kind": "compressed_attention", "num_heads": hf.num_attention_heads, "head_dim": hf.head_dim,
             "rope_head_dim": hf.qk_rope_head_dim, "q_lora_rank": hf.q_lora_rank, "output_groups": hf.o_groups,
             "output_rank": hf.o_lora_rank, "window": hf.sliding_window}
    main, compress = (read_rope_fields(hf, hf.rope_parameters[key], "interleaved") for key in ("main", "compress"))
    indexer = {"num_heads": hf.index_n_heads, "head_dim": hf.index_head_dim, "topk": hf.index_topk}
    mixers = {
        "window": sizes | {"rope": main, "ratio": None},
        "csa": sizes | {"rope": compress, "ratio": hf.compress_rates[SPARSE], "indexer": indexer},
        "hca": sizes | {"rope": compress, "ratio": hf.compress_rates[HEAVY], "overlap": False},
    }
    moe = {"kind": "moe", "router": "sqrt_softplus", "correction_bias": True, "num_experts": hf.n_routed_experts,
           "num_experts_per_tok": hf.num_experts_per_tok, "moe_intermediate_size": hf.moe_intermediate_size,
           "num_shared_experts": 1, "routed_scaling_factor": hf.routed_scaling_factor, "swiglu_limit": hf.swiglu_limit,
           "hash_layers": [index for index, kind in enumerate(hf.mlp_layer_types) if kind == "hash_moe"]}
    return read_base(hf, [MIXER_NAMES[kind] for kind in hf.layer_types], mixers, moe, residual={
        "form": "mhc", "num_streams": hf.hc_mult, "eps": hf.hc_eps, "sinkhorn_iterations": hf.hc_sinkhorn_iters})


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Make the config.json of a model in the format of this family."""
    layers = [require_kind(config.mixers[name], CompressedAttentionConfig) for name in config.layers()]
    kinds = [_kind_of(mixer) for mixer in layers]
    by_kind = dict(zip(kinds, layers, strict=True))
    some, moe, residual = layers[0], require_moe(config), config.residual
    if not isinstance(residual, MHCConfig):
        raise ConfigError("residual.form", "does not fit the format", got=residual.form, expected="mhc")
    rates = {kind: by_kind[kind].ratio for kind in (SPARSE, HEAVY) if kind in by_kind}
    fields = write_base(config) | {
        "model_type": "deepseek_v4", "layer_types": kinds, "num_attention_heads": some.num_heads,
        "num_key_value_heads": 1, "head_dim": some.head_dim, "qk_rope_head_dim": some.rope_head_dim,
        "q_lora_rank": some.q_lora_rank, "o_groups": some.output_groups, "o_lora_rank": some.output_rank,
        "sliding_window": some.window, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "partial_rotary_factor": some.rope_head_dim / some.head_dim, "scoring_func": "sqrtsoftplus",
        "rope_parameters": _write_ropes(by_kind), "compress_rates": {SPARSE: 4, HEAVY: 128} | rates,
        "hc_mult": residual.num_streams, "hc_eps": residual.eps, "hc_sinkhorn_iters": residual.sinkhorn_iterations,
        "mlp_layer_types": ["hash_moe" if index in moe.hash_layers else "moe" for index in range(config.num_layers)],
        "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok, "n_shared_experts": 1,
        "moe_intermediate_size": moe.moe_intermediate_size, "norm_topk_prob": True,
        "routed_scaling_factor": moe.routed_scaling_factor, "num_nextn_predict_layers": 0,
    }
    if moe.swiglu_limit is None:
        raise ConfigError("feed_forward.swiglu_limit", "does not fit the format", got=None, expected="a bound")
    fields["swiglu_limit"] = moe.swiglu_limit
    indexer = by_kind[SPARSE].indexer if SPARSE in by_kind else None
    if indexer is not None:
        fields |= {"index_n_heads": indexer.num_heads, "index_head_dim": indexer.head_dim, "index_topk": indexer.topk}
    return fields


def _kind_of(mixer: CompressedAttentionConfig) -> str:
    """The layer type of a mixer."""
    if mixer.ratio is None:
        return WINDOW
    return HEAVY if mixer.indexer is None else SPARSE


def _write_ropes(by_kind: dict[str, CompressedAttentionConfig]) -> dict[str, Any]:
    """The two rotations: of layers with a window alone, and of those with entries."""
    entries = next((by_kind[kind].rope for kind in (SPARSE, HEAVY) if kind in by_kind), RopeConfig(theta=160000.0))
    window = by_kind[WINDOW].rope if WINDOW in by_kind else RopeConfig()
    partial = {"partial_rotary_factor": next(m.rope_head_dim / m.head_dim for m in by_kind.values())}
    found = {}
    for name, rope in (("main", window), ("compress", entries)):
        scaling = {"rope_type": "default"} if rope.scaling is None else write_yarn(rope.scaling)
        found[name] = scaling | {"rope_theta": rope.theta} | partial
    return found


def map_layer(config: ModelConfig, layer: LayerToMap) -> Iterator[TensorRule]:
    """Yield the rules for the tensors of one layer."""
    mixer, index = require_kind(layer.mixer, CompressedAttentionConfig), int(layer.ours.split(".")[1])
    yield from rename_tensors(layer.ours, layer.theirs, ("mixer_norm.weight", "attn_norm.weight"),
                              ("feed_forward_norm.weight", "ffn_norm.weight"))
    for branch, theirs in (("mixer", "attn"), ("feed_forward", "ffn")):
        yield from rename_tensors(f"{layer.ours}{branch}_residual.coefficients.", f"{layer.theirs}hc_{theirs}_",
                                  *COEFFICIENTS)
    yield from _map_attention(mixer, f"{layer.ours}mixer.", f"{layer.theirs}attn.")
    yield from _map_experts(require_moe(config), index, f"{layer.ours}feed_forward.", f"{layer.theirs}ffn.")


def _map_attention(mixer: CompressedAttentionConfig, ours: str, theirs: str) -> Iterator[TensorRule]:
    yield from rename_tensors(ours, theirs, ("q_a_proj.weight", "wq_a.weight"), ("q_a_norm.weight", "q_norm.weight"),
                              ("q_b_proj.weight", "wq_b.weight"), ("kv_proj.weight", "wkv.weight"), "kv_norm.weight",
                              ("output.up_proj.weight", "wo_b.weight"))
    groups, rank = mixer.output_groups, mixer.output_rank
    width = mixer.num_heads * mixer.head_dim // groups
    yield map_tensors(f"{ours}output.down", f"{theirs}wo_a.weight",
                      PerTensor((Reshape((groups, rank, width), (groups * rank, width)),)))
    if mixer.sinks:
        yield from rename_tensors(ours, theirs, ("sinks", "attn_sink"))
    form = mixer.entry_form
    if form is None:
        return
    parts = [("entries.", "compressor.")]
    if mixer.indexer is not None:
        parts.append(("indexer.entries.", "indexer.compressor."))
        yield from rename_tensors(f"{ours}indexer.", f"{theirs}indexer.", ("q_proj.weight", "wq_b.weight"),
                                  "weights_proj.weight")
    for own, other in parts:
        yield from rename_tensors(ours + own, theirs + other, ("kv_proj.weight", "wkv.weight"),
                                  ("gate_proj.weight", "wgate.weight"), "norm.weight")
        yield map_tensors(f"{ours}{own}position_bias", f"{theirs}{other}ape", SideBySide(form.series))


def _map_experts(moe: MoEConfig, index: int, ours: str, theirs: str) -> Iterator[TensorRule]:
    yield from rename_tensors(ours, theirs, ("router.weight", "gate.weight"),
                              ("router.table", "gate.tid2eid") if index in moe.hash_layers else
                              ("router.bias", "gate.bias"))
    for own, names, fused in (("gate_up", ("w1", "w3"), "gate_up_proj"), ("down", ("w2",), "down_proj")):
        one_by_one = tuple(f"{theirs}experts.{expert}.{name}.weight" for expert in range(moe.num_experts)
                           for name in names)
        yield map_tensors(f"{ours}experts.{own}", one_by_one, StackedExperts(moe.num_experts, len(names)),
                          KeyLayout((f"{theirs}experts.{fused}",)))
    yield from rename_tensors(f"{ours}shared.", f"{theirs}shared_experts.", ("gate_proj.weight", "w1.weight"),
                              ("down_proj.weight", "w2.weight"), ("up_proj.weight", "w3.weight"))


def map_streams(config: ModelConfig) -> Iterator[TensorRule]:
    """Yield the rules for the weights by which the streams end."""
    yield from rename_tensors("residual.end_coefficients.", "hc_head_", *COEFFICIENTS)


FAMILY = register_family(Family(
    name="deepseek_v4", architecture="DeepseekV4ForCausalLM", read_config=read_config, write_config=write_config,
    map_layer=map_layer, map_model=map_streams, embedding_key="embed.weight", head_key="head.weight",
    norm_key="norm.weight", layers_key="layers", renamed_keys=RUNTIME_KEYS, ignored_keys=(r"^(model\.)?mtp\.",),
))
