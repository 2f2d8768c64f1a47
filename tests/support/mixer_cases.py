"""Small mixers, one for each published form, and the helpers that the mixer tests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridlm.model.contract_check import Subject
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers import (
    AttentionConfig,
    DeltaRuleConfig,
    IndexerConfig,
    LinearAttentionConfig,
    MLAConfig,
)
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.rope import RopeConfig, YarnConfig
from hybridlm.model.sequence import SequenceInfo

HIDDEN = 24
YARN = YarnConfig(factor=4.0, original_max_position=64, mscale=1.0, mscale_all_dim=0.7)
INDEXER = {"num_heads": 16, "head_dim": 8, "topk": 6}
MLA_DIMS = {"num_heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
NOPE = RopeConfig(kind="none")

CASES: dict[str, MixerConfig] = {
    "llama": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    "qwen3_next_full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head", output_gate="element",
                                       rope=RopeConfig(partial_rotary_factor=0.25)),
    "minimax_m2": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="full",
                                  rope=RopeConfig(partial_rotary_factor=0.5)),
    "gpt_oss": AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, window=9, sinks=True, qkv_bias=True, o_bias=True,
        rope=RopeConfig(scaling=YarnConfig(factor=8.0, original_max_position=64, truncate=False))),
    "nope_head_gate": AttentionConfig(num_heads=2, head_dim=8, rope=NOPE, output_gate="head"),
    "attention_indexed": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, indexer=IndexerConfig(**INDEXER)),
    "deepseek_v3": MLAConfig(**MLA_DIMS, q_lora_rank=10, norm_eps=1e-6,
                             rope=RopeConfig(kind="interleaved", scaling=YARN)),
    "kimi_full": MLAConfig(**MLA_DIMS, rope=NOPE, norm_eps=1e-6),
    "bailing_full": MLAConfig(**MLA_DIMS, output_gate="head", norm_eps=1e-6, bias=True),
    "mla_half_no_shared_key": MLAConfig(**{**MLA_DIMS, "qk_rope_head_dim": 0}, rope=NOPE, output_gate="element"),
    "deepseek_v32": MLAConfig(**MLA_DIMS, q_lora_rank=10, indexer=IndexerConfig(**INDEXER)),
    "glm_moe_dsa": MLAConfig(**MLA_DIMS, q_lora_rank=10, indexer=IndexerConfig(**INDEXER, rope_kind="interleaved")),
    "glm5_next": MLAConfig(**{**MLA_DIMS, "qk_rope_head_dim": 0}, q_lora_rank=10, rope=NOPE, indexer=IndexerConfig(
        **{**INDEXER, "topk": 8}, pool=4, rope_kind="none")),
    "attention_pooled": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, indexer=IndexerConfig(
        num_heads=16, head_dim=8, topk=9, num_first=3, num_local=3, pool=3)),
    "kda": DeltaRuleConfig(num_heads=2, head_dim=8, gate_rank=6, output_gate="sigmoid", output_gate_rank=6),
    "kda_safe": DeltaRuleConfig(num_heads=2, head_dim=8, gate="lower_bounded", gate_dtype="model",
                                output_gate="sigmoid"),
    "gdn": DeltaRuleConfig(num_heads=2, num_value_heads=4, head_dim=8, decay="scalar", a_init=(0.01, 16.0),
                           dt_bias_init="ones"),
    "olmo_gdn": DeltaRuleConfig(num_heads=2, head_dim=6, value_head_dim=12, decay="scalar", beta_scale=2.0,
                                norm_eps=1e-5),
    "deltanet": DeltaRuleConfig(num_heads=2, head_dim=8, decay="none", output_gate="none", conv_size=2),
    "lightning": LinearAttentionConfig(num_heads=4, head_dim=8),
    "retnet": LinearAttentionConfig(num_heads=4, head_dim=8, value_head_dim=12, slopes="retnet", feature_map="none",
                                    value_map="none", scale=None, norm="head", output_gate="silu"),
    "linear_attention": LinearAttentionConfig(num_heads=2, head_dim=8, decay="none", feature_map="elu1",
                                              value_map="none", norm="none", output_gate="none"),
    "gla": LinearAttentionConfig(num_heads=2, head_dim=8, decay="channel", gate="logsigmoid", gate_rank=4,
                                 dt_bias_init="zeros", feature_map="none", value_map="none", scale=None, norm="head",
                                 output_gate="silu"),
    "mamba2": LinearAttentionConfig(num_heads=2, num_value_heads=4, head_dim=8, decay="scalar", discretize=True,
                                    conv_size=4, feature_map="none", value_map="none", norm="none",
                                    output_gate="silu"),
}
ZERO_CENTERED = {"qwen3_next_full", "gdn"}


def context_of(name: str = "", layer_index: int = 1, hidden_size: int = HIDDEN,
               layers: Sequence[MixerConfig] = ()) -> LayerContext:
    """The context of one layer; `layers` are the mixers of all of them, where they read from one another."""
    norm = NormConfig(eps=1e-5, zero_centered=name in ZERO_CENTERED)
    return LayerContext(hidden_size=hidden_size, layer_index=layer_index, num_layers=4, norm=norm, max_position=256,
                        layers=[str(index) for index in range(len(layers))],
                        mixers={str(index): mixer for index, mixer in enumerate(layers)})


def subject(name: str) -> Subject:
    """The mixer of case `name` as the contract checks take it."""
    return Subject(CASES[name], context_of(name))


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    """The mixer of case `name` with every parameter away from its neutral value; seeds torch for what follows."""
    torch.manual_seed(seed)
    return subject(name).build(dtype, seed)


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(mixer, x, cu_seqlens=None, state=None, offset: int = 0) -> torch.Tensor:
    seq = SequenceInfo.make(x.shape[0], x.shape[1], x.device, cu_seqlens, offset)
    return mixer(x, seq, state)[0]
