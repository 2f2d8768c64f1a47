"""Forms of softmax attention and MLA, with and without an indexer."""

from hybridlm.model.mixers import AttentionConfig, IndexerConfig, MLAConfig
from hybridlm.model.mixers.common.masks import MaskConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.rope import RopeConfig, YarnConfig

YARN = YarnConfig(factor=4.0, original_max_position=64, mscale=1.0, mscale_all_dim=0.7)
INDEXER = {"num_heads": 16, "head_dim": 8, "topk": 6}
MLA_DIMS = {"num_heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
NOPE = RopeConfig(kind="none")

FORMS: dict[str, MixerConfig] = {
    "llama": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    "chunked": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, sinks=True,
                               mask=MaskConfig(kind="chunk", size=9)),
    "strided": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, mask=MaskConfig(kind="strided", size=7)),
    "fixed": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, mask=MaskConfig(kind="fixed", size=8, columns=2)),
    "log_sparse": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, mask=MaskConfig(kind="log", size=3)),
    "random_blocks": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, mask=MaskConfig(
        kind="blocks", size=5, columns=1, block=4, random=2)),
    "dilated": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8,
                               mask=MaskConfig(kind="dilated", size=6, branches=2, factor=3)),
    "qwen3_next_full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head", output_gate="element",
                                       rope=RopeConfig(partial_rotary_factor=0.25)),
    "minimax_m2": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="full",
                                  rope=RopeConfig(partial_rotary_factor=0.5)),
    "gpt_oss": AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, window=9, sinks=True, qkv_bias=True, o_bias=True,
        rope=RopeConfig(scaling=YarnConfig(factor=8.0, original_max_position=64, truncate=False))),
    "window_first_tokens": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=5, first_tokens=2,
                                           qk_norm="head"),
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
}
FP32 = {"sinks", "indexer.weights_proj.weight"}
NO_MATRICES = {"indexer.pool.bias"}
