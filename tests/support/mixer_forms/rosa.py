"""Forms of ROSA."""

from hybridlm.model.mixers import ROSAConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {"rosa": ROSAConfig(), "rosa_4bit": ROSAConfig(bits=4, unmatched="zero")}
FP32 = {"scale", "mix"}
NO_MATRICES = {"mix"}
UNDIVIDED = set(FORMS)
SIGNS = set(FORMS)
