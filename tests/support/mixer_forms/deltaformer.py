"""Forms of DeltaFormer."""

from hybridlm.model.mixers import DeltaFormerConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "deltaformer": DeltaFormerConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True, qkv_bias=True),
}
