"""Forms of attention to selected blocks: one for each published selector."""

from hybridlm.model.mixers import BlockAttentionConfig
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.mixers.selectors import (
    BoundSelectorConfig,
    CompressedSelectorConfig,
    EntmaxSelectorConfig,
    GateSelectorConfig,
    IndexHeadsSelectorConfig,
    LandmarkSelectorConfig,
    MeanSelectorConfig,
)
from hybridlm.model.rope import RopeConfig

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}

NO_MATRICES = {"selector.landmark"}

FORMS: dict[str, MixerConfig] = {
    "moba": BlockAttentionConfig(**HEADS, block=5, topk=2),
    "infllm_v2": BlockAttentionConfig(
        **HEADS, block=4, topk=3, first=1, local=0, local_window=6, output_gate="element", qk_norm="head",
        rope=RopeConfig(kind="none"), selector=CompressedSelectorConfig(length=4, stride=2, normaliser="coarse")),
    "quest": BlockAttentionConfig(**HEADS, block=4, topk=3, local=0, sinks=True, selector=BoundSelectorConfig()),
    "seer_r": BlockAttentionConfig(**HEADS, block=4, topk=3, selector=GateSelectorConfig(dim=6)),
    "msa": BlockAttentionConfig(**HEADS, block=4, topk=3, qk_norm="head", target="sum",
                                rope=RopeConfig(partial_rotary_factor=0.5), selector=IndexHeadsSelectorConfig()),
    "qsa": BlockAttentionConfig(**HEADS, block=3, topk=4, local=0, output_gate="element",
                                selector=IndexHeadsSelectorConfig(num_heads=4, head_dim=6, lists_for="all",
                                                                  reduce="mean", relu=True)),
    "hils": BlockAttentionConfig(**HEADS, block=4, topk=5, local=2, qk_norm="head",
                                 selector=LandmarkSelectorConfig(rank=5)),
    "dash": BlockAttentionConfig(**HEADS, block=4, topk=6, local=2, selector=EntmaxSelectorConfig(sigma=2.0)),
    "group_means": BlockAttentionConfig(**HEADS, block=4, topk=2, qkv_bias=True,
                                        selector=MeanSelectorConfig(heads="group")),
}
FP32 = {"sinks", "selector.landmark"}
