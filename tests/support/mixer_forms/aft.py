"""Forms of AFT-full and AFT-local."""

from hybridlm.model.mixers import AFTConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {"aft_full": AFTConfig(rank=3), "aft_local": AFTConfig(rank=2, weight_window=5)}
FP32 = {"left", "right"}
UNDIVIDED = set(FORMS)
