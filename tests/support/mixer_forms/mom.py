"""Forms of the mixture of memories."""

from hybridlm.model.mixers import MoMConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {"mom": MoMConfig(num_heads=2, head_dim=6, value_head_dim=4, num_memories=3, topk=2)}
NO_MATRICES = {"q_conv.weight", "k_conv.weight", "v_conv.weight"}
UNDIVIDED = set(FORMS)
