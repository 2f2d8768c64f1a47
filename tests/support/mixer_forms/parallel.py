"""Forms of several mixers on one norm."""

from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, MambaConfig, ParallelConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "falcon_h1": ParallelConfig(
        branches={"attention": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
                  "ssm": DeltaRuleConfig(num_heads=2, head_dim=8, decay="scalar")},
        input_scale={"ssm": 0.5}, output_scale={"attention": 0.25, "ssm": 2.0}),
    "hymba": ParallelConfig(
        branches={"attention": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=5),
                  "ssm": MambaConfig(state_size=4, conv_size=3, inner_norm="learned")},
        norm="branch", combine="mean"),
}
