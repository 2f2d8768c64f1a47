"""Forms of Mamba, Longhorn, Mamba-2 and Mamba-3."""

from hybridlm.model.mixers import Mamba2Config, Mamba3Config, MambaConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "mamba": MambaConfig(state_size=4, dt_rank=3),
    "falcon_mamba": MambaConfig(state_size=4, dt_rank=3, inner_norm="plain", bias=True),
    "jamba": MambaConfig(state_size=4, inner_norm="learned", conv_size=3),
    "longhorn": MambaConfig(rule="longhorn", state_size=4, dt_rank=3),
    "mamba2": Mamba2Config(num_heads=4, head_dim=6, state_size=8, num_groups=2),
    "falcon_h1_mamba2": Mamba2Config(num_heads=2, head_dim=6, state_size=8, norm="none", skip="channel", bias=True,
                                     dt_min=0.02, dt_max=2.0, input_scales=[0.5, 1.5, 0.8, 1.2, 0.7]),
    "mamba3": Mamba3Config(num_heads=4, head_dim=6, state_size=8, num_groups=2),
    "mamba3_norm": Mamba3Config(num_heads=2, head_dim=6, state_size=8, rope_fraction=1.0, norm=True),
    "mamba3_mimo": Mamba3Config(num_heads=4, head_dim=6, state_size=8, num_groups=2, rank=3),
    "mamba3_mimo_norm": Mamba3Config(num_heads=2, head_dim=6, state_size=4, rope_fraction=1.0, rank=2, norm=True),
}
FP32 = {"A_log", "D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"}
OTHER_STARTS = {"dt_proj.weight"}
NO_MATRICES = {"A_log", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o", "conv.weight"}
