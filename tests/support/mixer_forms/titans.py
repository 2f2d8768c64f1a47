"""Forms of the memory of Titans."""

from hybridlm.model.mixers import TitansConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "titans_linear": TitansConfig(num_heads=2, head_dim=6, memory="linear", chunk=4, max_rate=0.2),
    "titans_mlp": TitansConfig(num_heads=2, head_dim=4, expand=2, chunk=4, max_rate=0.2, conv_size=3),
}
FP32 = {"W1", "W2", "alpha_bias", "eta_bias", "theta_bias"}
NO_MATRICES = {"q_conv.weight", "k_conv.weight", "v_conv.weight"}
UNDIVIDED = set(FORMS)
