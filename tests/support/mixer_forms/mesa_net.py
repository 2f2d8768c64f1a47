"""Forms of MesaNet."""

from hybridlm.model.mixers import MesaNetConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {"mesa_net": MesaNetConfig(num_heads=2, head_dim=6, iterations=12)}
FP32 = {"a_bias", "b_bias", "lambda_raw"}
NO_MATRICES = {"q_conv.weight", "k_conv.weight"}
