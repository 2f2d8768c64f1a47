"""Forms of the delta rule and of linear attention."""

from hybridlm.model.mixers import DeltaRuleConfig, LinearAttentionConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "kda": DeltaRuleConfig(num_heads=2, head_dim=8, gate_rank=6, output_gate="sigmoid", output_gate_rank=6),
    "kda_safe": DeltaRuleConfig(num_heads=2, head_dim=8, gate="lower_bounded", gate_dtype="model",
                                output_gate="sigmoid"),
    "gdn": DeltaRuleConfig(num_heads=2, num_value_heads=4, head_dim=8, decay="scalar", a_init=(0.01, 16.0),
                           dt_bias_init="ones"),
    "olmo_gdn": DeltaRuleConfig(num_heads=2, head_dim=6, value_head_dim=12, decay="scalar", beta_scale=2.0,
                                norm_eps=1e-5),
    "deltanet": DeltaRuleConfig(num_heads=2, head_dim=8, decay="none", output_gate="none", conv_size=2),
    "delta_product": DeltaRuleConfig(num_heads=2, head_dim=8, decay="none", steps=2, beta_scale=2.0, conv_size=2),
    "gated_delta_product": DeltaRuleConfig(num_heads=2, num_value_heads=4, head_dim=6, decay="scalar", steps=3,
                                           beta_scale=2.0, a_init=(0.0, 16.0)),
    "comba": DeltaRuleConfig(num_heads=2, head_dim=8, value_head_dim=12, decay="scalar", read="before",
                             query_correction=True, output_gate="sigmoid"),
    "gdn2": DeltaRuleConfig(num_heads=2, head_dim=8, gate_rank=6, strength="channel", output_gate="sigmoid",
                            output_gate_rank=6),
    "preconditioned_kda": DeltaRuleConfig(num_heads=2, head_dim=8, gate_rank=6, precondition=True,
                                          dt_bias_init="zeros", output_gate="sigmoid"),
    "longhorn_exact": DeltaRuleConfig(num_heads=2, num_value_heads=4, head_dim=8, decay="none", implicit=True,
                                      qk_l2norm=False, output_gate="none"),
    "lightning": LinearAttentionConfig(num_heads=4, head_dim=8),
    "lightning_rope": LinearAttentionConfig(num_heads=2, head_dim=8, feature_map="none", value_map="none",
                                            qk_norm="head", rotation="rope", scale=None),
    "stored_slopes": LinearAttentionConfig(num_heads=2, num_value_heads=4, head_dim=8, slopes="stored"),
    "transnormer": LinearAttentionConfig(num_heads=3, head_dim=8, slopes="alibi", value_map="none", norm_weight=False,
                                         output_gate="linear"),
    "transnormer_angles": LinearAttentionConfig(num_heads=3, head_dim=6, slopes="alibi", value_map="none",
                                                norm_weight=False, output_gate="linear", rotation="learned"),
    "retnet": LinearAttentionConfig(num_heads=4, head_dim=8, value_head_dim=12, slopes="retnet", feature_map="none",
                                    value_map="none", rotation="retnet", scale=None, norm="head", norm_weight=False,
                                    output_gate="silu"),
    "linear_attention": LinearAttentionConfig(num_heads=2, head_dim=8, decay="none", feature_map="elu1",
                                              value_map="none", norm="none", output_gate="none"),
    "gla": LinearAttentionConfig(num_heads=2, head_dim=8, decay="channel", gate="logsigmoid", gate_rank=4,
                                 dt_bias_init="zeros", feature_map="none", value_map="none", scale=None, norm="head",
                                 output_gate="silu"),
    "ssd": LinearAttentionConfig(num_heads=2, num_value_heads=4, head_dim=8, decay="scalar", discretize=True,
                                 conv_size=4, feature_map="none", value_map="none", norm="none", output_gate="silu"),
}
FP32 = {"A_log", "dt_bias", "theta", "correction", "correction_gate",
        *(f"preconditioner.{name}" for name in ("A_log", "dt_bias", "center"))}
NO_MATRICES = {"q_conv", "k_conv", "v_conv", "theta"}
