"""Forms of PaTH attention."""

from hybridlm.model.mixers import PathAttentionConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "path": PathAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, w_rank=6),
    "path_fox": PathAttentionConfig(num_heads=2, head_dim=8, w_rank=None, conv_size=0, qk_norm=True,
                                    forget_gate=True),
}
NO_MATRICES = {"w_conv.weight"}
