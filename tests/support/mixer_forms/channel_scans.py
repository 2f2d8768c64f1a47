"""Forms of mixers with one state per channel."""

from hybridlm.model.mixers import MinRNNConfig, RGLRUConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "griffin": RGLRUConfig(num_heads=3),
    "min_gru": MinRNNConfig(),
    "min_lstm": MinRNNConfig(rule="lstm", conv_size=0, expand=1.0),
}
FP32 = {"Lambda", "input_bias", "recurrence_bias"}
NO_MATRICES = {"conv.weight"}
