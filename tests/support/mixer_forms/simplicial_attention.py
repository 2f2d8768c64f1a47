"""Forms of 2-simplicial attention."""

from hybridlm.model.mixers import SimplicialAttentionConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "simplicial": SimplicialAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=9, second_window=4),
}
