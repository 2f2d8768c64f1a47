"""Forms of mixers that read from an earlier layer, each with the mixer of that layer."""

from hybridlm.model.mixers import GatedMemoryConfig, MambaConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {}
READERS: dict[str, tuple[MixerConfig, MixerConfig]] = {
    "gated_memory": (GatedMemoryConfig(), MambaConfig(state_size=4, dt_rank=3)),
    "gated_memory_with_norm": (GatedMemoryConfig(norm=True), MambaConfig(state_size=4, expand=1)),
}
