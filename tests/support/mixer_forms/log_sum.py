"""Forms of mixers that read means weighted by exponentials of keys."""

from hybridlm.model.mixers import AFTSimpleConfig, RWKV4Config
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {"rwkv4": RWKV4Config(), "aft_simple": AFTSimpleConfig()}
FP32 = {"decay", "bonus", "mix"}
NO_MATRICES = {"mix"}
