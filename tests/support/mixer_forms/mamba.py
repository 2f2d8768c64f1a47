"""Forms of Mamba and Longhorn."""

from hybridlm.model.mixers import MambaConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "mamba": MambaConfig(state_size=4, dt_rank=3),
    "falcon_mamba": MambaConfig(state_size=4, dt_rank=3, inner_norm="plain", bias=True),
    "jamba": MambaConfig(state_size=4, inner_norm="learned", conv_size=3),
    "longhorn": MambaConfig(rule="longhorn", state_size=4, dt_rank=3),
}
FP32 = {"A_log", "D", "dt_bias"}
OTHER_STARTS = {"dt_proj.weight"}
NO_MATRICES = {"A_log", "conv.weight"}
