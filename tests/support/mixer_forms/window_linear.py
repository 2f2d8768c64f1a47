"""Forms of a softmax window beside a linear part."""

from hybridlm.model.mixers import WindowGLAConfig, WindowLinearConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "lolcats": WindowLinearConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=5),
    "lolcats_convex": WindowLinearConfig(num_heads=2, head_dim=8, window=12, feature_dim=6, convex=True,
                                         qkv_bias=True),
    "liger": WindowGLAConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=5),
}
FP32 = {"window_factor"}
