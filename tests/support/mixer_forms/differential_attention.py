"""Forms of differential attention."""

from hybridlm.model.mixers import DifferentialAttentionConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.rope import RopeConfig

FORMS: dict[str, MixerConfig] = {
    "diff_attention": DifferentialAttentionConfig(num_heads=8, num_kv_heads=4, head_dim=4),
    "phi4_flash_swa": DifferentialAttentionConfig(num_heads=8, head_dim=4, window=20, qkv_bias=True, o_bias=True,
                                                  rope=RopeConfig(kind="none"), norm_weight=False),
}
READERS: dict[str, tuple[MixerConfig, MixerConfig]] = {
    "differential_attention_to_earlier_keys": (
        DifferentialAttentionConfig(num_heads=8, head_dim=4, share_keys=True, window=7), FORMS["diff_attention"]),
}
FP32 = {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}
