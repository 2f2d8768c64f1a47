"""Forms of S4D and H3."""

from hybridlm.model.mixers import H3Config, S4DConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "s4d": S4DConfig(state_size=6),
    "h3": H3Config(state_size=4),
    "h3_heads": H3Config(head_dim=4, state_size=6),
}
FP32 = {*(f"ssm.{name}" for name in ("A_log", "A_imag", "log_dt", "B", "C", "D")), "k_skip"}
OTHER_STARTS = {"s4d/out_proj.weight"}
NO_MATRICES = {*(f"ssm.{name}" for name in ("A_log", "A_imag", "B", "C")), "shift.weight"}
