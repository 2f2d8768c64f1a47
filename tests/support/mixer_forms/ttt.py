"""Forms of test-time training."""

from hybridlm.model.mixers import TTTConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "ttt_linear": TTTConfig(num_heads=2, head_dim=6, mini_batch=4),
    "ttt_mlp": TTTConfig(num_heads=2, head_dim=4, mini_batch=4, memory="mlp", expand=2, conv_size=3,
                         output_gate="gelu"),
}
FP32 = {"place_scale", "memory_norm_weight", "memory_norm_bias", "W1", "b1", "W2", "b2", "rate_bias"}
NO_MATRICES = {"memory_norm_weight", "memory_norm_bias", "b1", "b2", "q_conv.weight", "k_conv.weight"}
UNDIVIDED = set(FORMS)
