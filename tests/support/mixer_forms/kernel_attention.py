"""Forms of kernelised attention, one for each feature map that differs in more than an elementwise function."""

from hybridlm.model.mixers import KernelAttentionConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "performer": KernelAttentionConfig(num_heads=2, head_dim=8, feature_map="performer"),
    "rfa_gate": KernelAttentionConfig(num_heads=2, head_dim=8, feature_map="rfa", gate="scalar", normalizer="floor",
                                      normalizer_eps=1.0),
    "cosformer": KernelAttentionConfig(num_heads=2, head_dim=8, feature_map="cosformer", normalizer="floor"),
    "hedgehog": KernelAttentionConfig(num_heads=2, head_dim=8, feature_map="hedgehog"),
    "based": KernelAttentionConfig(num_heads=2, head_dim=4, value_head_dim=8, feature_map="taylor",
                                   normalizer_eps=1e-12),
    "rebased": KernelAttentionConfig(num_heads=2, head_dim=4, feature_map="rebased", value_head_dim=8),
    "t2r": KernelAttentionConfig(num_heads=2, head_dim=8, feature_map="t2r", features=4),
}
FP32 = {"feature_map.sigma", "gate_bias", "feature_map.q_bias", "feature_map.k_bias"}
