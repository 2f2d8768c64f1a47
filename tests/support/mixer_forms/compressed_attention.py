"""Forms of attention to a window and compressed entries: selected ones (CSA), all (HCA), none."""

from hybridlm.model.mixers import CompressedAttentionConfig, EntryIndexerConfig
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
FP32 = {"sinks", "indexer.weights_proj.weight", "entries.position_bias", "indexer.entries.position_bias"}
NO_MATRICES = {"entries.position_bias", "indexer.entries.position_bias"}
