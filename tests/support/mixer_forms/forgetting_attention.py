"""Forms of attention with a forget gate."""

from hybridlm.model.mixers import ForgettingAttentionConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.rope import RopeConfig

FORMS: dict[str, MixerConfig] = {
    "fox": ForgettingAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=20, rope=RopeConfig()),
    "fox_pro": ForgettingAttentionConfig(num_heads=4, head_dim=8, qk_norm=True, kv_shift=True, output_norm=True,
                                         output_gate="element"),
}
