"""Forms of the time mixes of RWKV."""

from hybridlm.model.mixers import RWKV6Config
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "rwkv5": RWKV6Config(num_heads=2, head_dim=8, version=5),
    "rwkv6": RWKV6Config(num_heads=2, head_dim=8, decay_rank=5, mix_rank=3),
}
FP32 = {"decay", "bonus", "mix", "mix_base"}
OTHER_STARTS = {"decay_a_proj.weight", "decay_b_proj.weight"}
NO_MATRICES = {"decay", "bonus", "mix"}
