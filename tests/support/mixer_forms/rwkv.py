"""Forms of the time mixes of RWKV."""

from hybridlm.model.mixers import RWKV6Config, RWKV7Config
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "rwkv5": RWKV6Config(num_heads=2, head_dim=8, version=5),
    "rwkv6": RWKV6Config(num_heads=2, head_dim=8, decay_rank=5, mix_rank=3),
    "rwkv7": RWKV7Config(num_heads=2, head_dim=8, decay_rank=5, rate_rank=4, gate_rank=6, value_rank=3),
}
READERS: dict[str, tuple[MixerConfig, MixerConfig]] = {"values_of_the_first_layer": (FORMS["rwkv7"], FORMS["rwkv7"])}
FP32 = {"decay", "bonus", "mix", "mix_base", "rate", "key_scale", "key_rate", "value_share"}
OTHER_STARTS = {"decay_a_proj.weight", "decay_b_proj.weight",
                *(f"rwkv7/{name}_proj.weight" for name in ("r", "k", "v", "o", "rate_a", "rate_b", "gate_a", "gate_b"))}
NO_MATRICES = {"decay", "bonus", "mix"}
