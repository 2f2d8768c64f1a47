"""Forms of GateLoop, Rodimus and LightNet."""

from hybridlm.model.mixers import GateLoopConfig, LightNetConfig, RodimusConfig, SimpleGateLoopConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "gate_loop": GateLoopConfig(num_heads=2, head_dim=6),
    "simple_gate_loop": SimpleGateLoopConfig(),
    "rodimus": RodimusConfig(key_dim=8, value_rank=5, conv_size=3),
    "lightnet": LightNetConfig(num_heads=2, head_dim=6, value_head_dim=8, output_gate_rank=5),
}
FP32 = {"select_bias", "tau_bias", "skip"}
OTHER_STARTS = {f"{name}_proj.weight" for name in ("query", "key", "select", "tau", "value_a", "value_b")}
NO_MATRICES = {"conv.weight"}
