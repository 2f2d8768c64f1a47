"""Forms of the gated short convolution."""

from hybridlm.model.mixers import GatedConvConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {"lfm2": GatedConvConfig(), "lfm2_with_biases": GatedConvConfig(conv_size=2, bias=True)}
