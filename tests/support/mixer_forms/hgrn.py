"""Forms of HGRN and HGRN-2."""

from hybridlm.model.mixers import HGRN2Config, HGRNConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "hgrn": HGRNConfig(),
    "hgrn_complex": HGRNConfig(state="complex", width=10),
    "hgrn2": HGRN2Config(num_heads=2, head_dim=8, value_head_dim=6),
}
FP32 = {"lower_bounds", "theta"}
NO_MATRICES = {"lower_bounds"}
