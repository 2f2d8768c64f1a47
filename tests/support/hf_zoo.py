"""Small random models of transformers, several configs a family, with nothing left at a trivial value."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
VOCAB = 97

BASE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": None, "bos_token_id": 1,
        "eos_token_id": None, "max_position_embeddings": 256}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
       "qk_nope_head_dim": 12, "v_head_dim": 10}
GROUPS = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
          "moe_intermediate_size": 16, "n_shared_experts": 1, "num_nextn_predict_layers": 0}
EXPERTS = GROUPS | {"n_routed_experts": 7, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
INDEX = {"index_n_heads": 32, "index_head_dim": 16, "index_topk": 10}
GDN = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
QWEN = BASE | GDN | {"head_dim": 16, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
                     "shared_expert_intermediate_size": 20}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.8}
IRREGULAR = ["linear_attention", "full_attention", "full_attention", "linear_attention", "linear_attention"]
KIMI = BASE | MLA | {"q_lora_rank": None, "linear_head_dim": 8, "linear_num_heads": 4, "num_local_experts": 7,
                     "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                     "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
BAILING = BASE | MLA | {"head_dim": 8, "q_lora_rank": None, "layer_group_size": 4, "first_k_dense_replace": 1,
                        "num_local_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_group": 4,
                        "topk_group": 2, "num_nextn_predict_layers": 0}
SSM = {key: BASE[key] for key in ("vocab_size", "hidden_size", "pad_token_id", "bos_token_id", "eos_token_id")} | {
    "num_hidden_layers": 3, "state_size": 6, "initializer_range": 0.03}
FALCON_H1 = BASE | {"num_hidden_layers": 3, "mamba_d_ssm": 24, "mamba_n_heads": 4, "mamba_d_head": 6,
                    "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
NEMOTRON = BASE | {"layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
                   "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 6, "ssm_state_size": 8, "n_groups": 2,
                   "chunk_size": 16}
NEMOTRON.pop("num_hidden_layers")
ZAMBA2 = BASE | {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3,
                 "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "adapter_rank": 5, "chunk_size": 16}
V4 = {key: BASE[key] for key in ("vocab_size", "hidden_size", "pad_token_id", "bos_token_id", "eos_token_id")} | {
    "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 24, "sliding_window": 9,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}, "o_groups": 2,
    "o_lora_rank": 12, "index_n_heads": 32, "index_head_dim": 16, "index_topk": 5, "partial_rotary_factor": 0.25,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_position_embeddings": 256,
    "mlp_layer_types": ["hash_moe", "moe", "moe"], "num_nextn_predict_layers": 0, "attn_implementation": "eager",
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32,
                        "beta_slow": 1}}

# case -> (model type, config)
CASES: dict[str, tuple[str, dict]] = {
    "kimi_linear": ("kimi_linear", KIMI),
    "kimi_linear-irregular": ("kimi_linear", KIMI | {
        "num_hidden_layers": 5, "layer_types": IRREGULAR, "mlp_layer_types": ["dense", "dense"] + ["sparse"] * 3,
        "num_local_experts": 12, "n_group": 4, "topk_group": 2, "linear_num_heads": 2, "q_lora_rank": 20,
        "linear_conv_kernel_dim": 3, "n_shared_experts": 2, "norm_topk_prob": False}),
    "qwen3_next": ("qwen3_next", QWEN),
    "qwen3_next-irregular": ("qwen3_next", QWEN | {
        "num_hidden_layers": 5, "layer_types": IRREGULAR, "mlp_only_layers": [1, 3], "tie_word_embeddings": True,
        "linear_num_key_heads": 1, "linear_num_value_heads": 3, "attention_bias": True, "norm_topk_prob": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}}),
    "qwen3_5_moe": ("qwen3_5_moe_text", QWEN | {"head_dim": 32}),
    "qwen3_5_moe-irregular": ("qwen3_5_moe_text", QWEN | {
        "head_dim": 32, "num_hidden_layers": 5, "layer_types": IRREGULAR, "tie_word_embeddings": True,
        "linear_num_value_heads": 2, "linear_value_head_dim": 8}),
    "minimax": ("minimax", BASE | {
        "head_dim": 8, "num_local_experts": 5, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "full_attn_alpha_factor": 1.7, "full_attn_beta_factor": 0.8, "linear_attn_alpha_factor": 1.3,
        "linear_attn_beta_factor": 0.9, "mlp_alpha_factor": 1.2, "mlp_beta_factor": 1.1}),
    "minimax-irregular": ("minimax", BASE | {
        "head_dim": 12, "num_attention_heads": 3, "num_key_value_heads": 1, "num_local_experts": 4,
        "num_hidden_layers": 5, "layer_types": IRREGULAR, "tie_word_embeddings": True, "num_experts_per_tok": 3}),
    "minimax_m2": ("minimax_m2", BASE | {"head_dim": 8, "num_local_experts": 7, "num_experts_per_tok": 2,
                                         "rotary_dim": 4}),
    "minimax_m2-full-rope": ("minimax_m2", BASE | {"head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 3,
                                                   "tie_word_embeddings": True}),
    "deepseek_v3": ("deepseek_v3", BASE | MLA | GROUPS | {"first_k_dense_replace": 1}),
    "deepseek_v3-yarn": ("deepseek_v3", BASE | MLA | EXPERTS | {
        "first_k_dense_replace": 2, "q_lora_rank": None, "rope_parameters": YARN, "attention_bias": True,
        "tie_word_embeddings": True, "norm_topk_prob": False, "n_shared_experts": 2}),
    "deepseek_v32": ("deepseek_v32", BASE | MLA | GROUPS | INDEX | {"first_k_dense_replace": 1}),
    "deepseek_v32-yarn": ("deepseek_v32", BASE | MLA | EXPERTS | INDEX | {
        "first_k_dense_replace": 0, "rope_parameters": YARN | {"mscale_all_dim": 1.0}, "attention_bias": True}),
    "glm_moe_dsa": ("glm_moe_dsa", BASE | MLA | EXPERTS | INDEX | {"first_k_dense_replace": 1}),
    "glm_moe_dsa-shared": ("glm_moe_dsa", BASE | MLA | EXPERTS | INDEX | {
        "num_hidden_layers": 6, "indexer_types": ["full", "full", "shared", "shared", "full", "shared"],
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse", "sparse"], "index_head_dim": 24}),
    "bailing_hybrid": ("bailing_hybrid", BAILING),
    "bailing_hybrid-softplus": ("bailing_hybrid", BAILING | {
        "num_hidden_layers": 5, "layer_types": IRREGULAR, "kda_safe_gate": False, "head_dim": 12,
        "num_local_experts": 7, "n_group": 1, "topk_group": 1, "rope_parameters": YARN}),
    "olmo_hybrid": ("olmo_hybrid", BASE),
    "olmo_hybrid-nope": ("olmo_hybrid", BASE | {
        "num_hidden_layers": 5, "layer_types": IRREGULAR, "linear_allow_neg_eigval": False, **GDN,
        "rope_parameters": {"rope_type": "default", "rope_theta": None}, "tie_word_embeddings": True}),
    "lfm2": ("lfm2", BASE | {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_multiple_of": 8}),
    "lfm2-bias": ("lfm2", BASE | {
        "num_hidden_layers": 3, "layer_types": ["full_attention", "conv", "conv"], "conv_bias": True, "conv_L_cache": 4,
        "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False}),
    "mamba": ("mamba", SSM | {"tie_word_embeddings": False}),
    "mamba-tied-bias": ("mamba", SSM | {"num_hidden_layers": 2, "use_bias": True, "time_step_rank": 5, "expand": 3,
                                        "conv_kernel": 3}),
    "falcon_mamba": ("falcon_mamba", SSM | {"mixer_rms_eps": 1e-4}),
    "falcon_mamba-bias": ("falcon_mamba", SSM | {"num_hidden_layers": 2, "use_bias": True, "time_step_rank": 3,
                                                 "tie_word_embeddings": False}),
    "falcon_h1": ("falcon_h1", FALCON_H1),
    "falcon_h1-multipliers": ("falcon_h1", FALCON_H1 | {
        "num_hidden_layers": 2, "mamba_n_groups": 2, "tie_word_embeddings": True, "mamba_rms_norm": True,
        "mamba_norm_before_gate": False, "mamba_proj_bias": True, "projectors_bias": True, "embedding_multiplier": 1.7,
        "lm_head_multiplier": 0.4, "key_multiplier": 0.6, "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 1.1, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.7,
        "ssm_multipliers": [0.7, 1.3, 0.8, 1.1, 0.9], "mlp_multipliers": [1.4, 0.6],
        "time_step_limit": [0.01, 2.0]}),
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "nemotron_h-bias": ("nemotron_h", NEMOTRON | {
        "layers_block_type": ["mlp", "linear_attention", "mlp", "full_attention", "linear_attention"],
        "use_bias": True, "use_conv_bias": False, "n_groups": 1, "time_step_min": 0.05}),
    "deepseek_v4": ("deepseek_v4", V4),
    "deepseek_v4-other": ("deepseek_v4", V4 | {
        "num_hidden_layers": 4, "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        "mlp_layer_types": ["moe"] * 4, "tie_word_embeddings": True, "hc_mult": 2, "rope_parameters": None,
        "partial_rotary_factor": 0.5}),
    "zamba2": ("zamba2", ZAMBA2),
    "zamba2-blocks": ("zamba2", ZAMBA2 | {
        "num_hidden_layers": 9, "layers_block_type": ["hybrid", "linear_attention", "hybrid"] * 3, "num_mem_blocks": 2,
        "num_key_value_heads": 4, "use_shared_attention_adapter": True, "use_mem_rope": True, "mamba_ngroups": 2,
        "hidden_act": "gelu_pytorch_tanh", "time_step_min": 0.05}),
    "llama": ("llama", BASE),
    "llama-bias": ("llama", BASE | {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 12}),
    "qwen3": ("qwen3", BASE | {"head_dim": 12}),
    "qwen3-yarn": ("qwen3", BASE | {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}}),
    "qwen3_moe": ("qwen3_moe", BASE | {"head_dim": 8, "num_experts": 7, "num_experts_per_tok": 2,
                                       "moe_intermediate_size": 16, "norm_topk_prob": True}),
    "qwen3_moe-sparse-step": ("qwen3_moe", BASE | {
        "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
        "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False}),
}


def build(case: str, **changes: object) -> PreTrainedModel:
    """The transformers model of a case, in evaluation mode."""
    model_type, config = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config | changes))
    perturb(model)
    return model.eval()


def perturb(model: nn.Module, seed: int = 1) -> None:
    """Move norms, biases and gates off the values that would hide a mistake, and make every branch count."""
    generator = torch.Generator().manual_seed(seed)
    biases = [(name, b) for name, b in model.named_buffers() if name.endswith("bias")]
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *biases]:
            if name.endswith("A_log"):  # slow decay: a state that forgets at once would hide what it holds
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 - 1)
            elif p.dim() <= 1 or p.numel() == max(p.shape):
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
            else:
                p.mul_(3.0)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # experts by token ids
                table.copy_(torch.rand(len(table), 4, generator=generator).topk(table.shape[1]).indices)


def tokens(rows: int, length: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
