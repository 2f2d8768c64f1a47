"""Forms of log-linear attention."""

from hybridlm.model.mixers import DeltaRuleConfig, Mamba2Config
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "log_linear_gdn": DeltaRuleConfig(num_heads=2, num_value_heads=4, head_dim=6, decay="scalar", a_init=(0.0, 16.0),
                                      levels=5),
    "log_linear_mamba2": Mamba2Config(num_heads=4, head_dim=6, state_size=8, num_groups=2, levels=8),
}
FP32 = {"level_scale"}
UNDIVIDED = set(FORMS)
