"""Forms of slot attention."""

from hybridlm.model.mixers import GatedSlotsConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "gsa": GatedSlotsConfig(num_heads=2, head_dim=6, value_head_dim=8, num_slots=5),
    "gsa_groups": GatedSlotsConfig(num_heads=4, num_kv_heads=2, head_dim=6, value_head_dim=8, num_slots=5),
    "abc": GatedSlotsConfig(num_heads=2, head_dim=8, num_slots=5, rule="abc"),
}
