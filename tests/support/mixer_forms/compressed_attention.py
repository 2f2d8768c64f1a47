"""Forms of attention to a window and compressed entries: selected ones (CSA), all (HCA), none, shared ones (CSA2)."""

from hybridlm.model.mixers import CompressedAttentionConfig, EntryIndexerConfig
from hybridlm.model.mixers.common.entry_indexer_config import CandidateConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.rope import RopeConfig

SIZES = {"num_heads": 4, "head_dim": 8, "rope_head_dim": 4, "q_lora_rank": 10, "output_groups": 2, "output_rank": 6,
         "window": 5}

FORMS: dict[str, MixerConfig] = {
    "csa": CompressedAttentionConfig(**SIZES, ratio=3, indexer=EntryIndexerConfig(num_heads=4, head_dim=6, topk=3)),
    "hca": CompressedAttentionConfig(**SIZES, ratio=7, overlap=False),
    "v4_window": CompressedAttentionConfig(**{**SIZES, "window": 9}, ratio=None, sinks=False,
                                           rope=RopeConfig(kind="none")),
}
# Layers that share entries (DeepSeek-V4.1): with projected index keys, and pooled ones.
_CSA2 = {**SIZES, "q_head_norm": False}
_FULL = CompressedAttentionConfig(**_CSA2, ratio=2, overlap=False, position_bias=False, indexer=EntryIndexerConfig(
    num_heads=4, head_dim=6, topk=3, key_input="entries"))
_TOP = CompressedAttentionConfig(**_CSA2, ratio=1, overlap=False, position_bias=False, indexer=EntryIndexerConfig(
    num_heads=2, head_dim=6, topk=4, key_input="entries", candidates=CandidateConfig(block=3, topk=2)))
FORMS |= {"csa2": _FULL, "csa2_candidates": _TOP}
READERS: dict[str, tuple[MixerConfig, MixerConfig]] = {
    "csa2_reuse": (CompressedAttentionConfig(**_CSA2, share_entries=True, indexer=EntryIndexerConfig(share=True)),
                   _FULL),
    "csa2_reindex": (CompressedAttentionConfig(**_CSA2, share_entries=True, ratio=1, indexer=EntryIndexerConfig(
        num_heads=3, head_dim=6, topk=4)), _TOP),
    "csa_reindex": (CompressedAttentionConfig(**SIZES, share_entries=True, ratio=3, indexer=EntryIndexerConfig(
        num_heads=3, head_dim=6, topk=2)), FORMS["csa"]),
    "hca_with_earlier_entries": (CompressedAttentionConfig(**SIZES, share_entries=True, source=0), FORMS["hca"]),
}
FP32 = {"sinks", "indexer.weights_proj.weight", "entries.position_bias", "indexer.entries.position_bias"}
NO_MATRICES = {"entries.position_bias", "indexer.entries.position_bias"}
