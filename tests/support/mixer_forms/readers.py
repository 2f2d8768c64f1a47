"""Forms of mixers that read from an earlier layer, each with the mixer of that layer."""

from hybridlm.model.mixers import (
    AttentionConfig,
    GatedMemoryConfig,
    IndexerConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    SharedAttentionConfig,
)
from hybridlm.model.mixers.common.chosen_blocks import ChosenBlocksConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.rope import RopeConfig
from tests.support.mixer_forms.softmax_attention import INDEXER, MLA_DIMS

FORMS: dict[str, MixerConfig] = {}
READERS: dict[str, tuple[MixerConfig, MixerConfig]] = {
    "gated_memory": (GatedMemoryConfig(), MambaConfig(state_size=4, dt_rank=3)),
    "gated_memory_with_norm": (GatedMemoryConfig(norm=True), Mamba2Config(num_heads=2, head_dim=8, state_size=4)),
    "shared_attention": (SharedAttentionConfig(), AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(kind="none"))),
    "shared_attention_in_a_window": (
        SharedAttentionConfig(num_heads=12, q_norm="head", q_bias=True, o_bias=True),
        AttentionConfig(num_heads=12, num_kv_heads=1, head_dim=8, window=9, qk_norm="head")),
    "shared_attention_with_a_window_of_its_own": (
        SharedAttentionConfig(window=7, sinks=True, output_gate="element"),
        AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)),
    "hysparse": (
        SharedAttentionConfig(blocks=True, near=6, q_norm="head", output_gate="element", sinks=True),
        AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head", sinks=True,
                        choose_blocks=ChosenBlocksConfig(block=4, topk=3))),
    "hysparse2": (
        SharedAttentionConfig(blocks=True, num_heads=2),
        AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=8, rope=RopeConfig(kind="none"), choose_blocks=(
            ChosenBlocksConfig(block=1, topk=9, first=1, local=4, pooling="sum", heads="sum")))),
    "clsa": (
        SharedAttentionConfig(indexer=IndexerConfig(num_heads=1, head_dim=6, topk=5, form="dot", rope_kind="none")),
        AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)),
    "clsa_shared": (
        SharedAttentionConfig(q_norm="head", indexer=IndexerConfig(share=True)), AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=8, indexer=IndexerConfig(
                num_heads=1, head_dim=6, topk=5, form="dot", rope_dim=4, mode="sparse"))),
    "attention_to_keys_of_an_earlier_input": (
        AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head", key_input=0),
        AttentionConfig(num_heads=2, head_dim=8, window=4)),
    "mla_with_earlier_latents": (
        MLAConfig(**MLA_DIMS, latent_source=0), MLAConfig(**{**MLA_DIMS, "num_heads": 4})),
    "mla_with_earlier_latents_and_its_own_selection": (
        MLAConfig(**MLA_DIMS, indexer=IndexerConfig(**INDEXER), latent_source=0), MLAConfig(**MLA_DIMS)),
}
