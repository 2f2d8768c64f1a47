"""Forms of native sparse attention: one for each way to compress."""

from hybridlm.model.mixers import NSAConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.rope import RopeConfig

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "length": 4, "stride": 2, "block": 4, "topk": 4, "near": 5}

FORMS: dict[str, MixerConfig] = {
    "nsa": NSAConfig(**SIZES),
    "nsa_weighted": NSAConfig(**{**SIZES, "length": 6}, compression="weighted", rope=RopeConfig(kind="none")),
    "nsa_branch_keys": NSAConfig(**SIZES, branch_keys=True),
    "nsa_mean": NSAConfig(**{**SIZES, "length": 2, "first": 0, "local": 1}, compression="mean"),
}
NO_MATRICES = {"compressor.places", "compressor.weight"}
