"""A DeepSeek-V3 with its multi-token prediction module against transformers, weight for weight, in fp32."""

import pytest
import torch

from hybridlm.model import build_model
from hybridlm.model.config import MTPConfig, ScheduleConfig
from hybridlm.model.feed_forward import MoEConfig
from hybridlm.model.mixers import MLAConfig
from hybridlm.model.rope import RopeConfig
from hybridlm.model.sequence import SequenceInfo
from tests.support.tiny_lm import config as lm_config

RENAMED = {
    "model.embed_tokens": "embed", "input_layernorm": "mixer_norm", "post_attention_layernorm": "feed_forward_norm",
    "self_attn": "mixer", "q_a_layernorm": "q_a_norm", "kv_a_layernorm": "kv_a_norm",
    "kv_a_proj_with_mqa": "kv_a_proj", "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.bias", "shared_experts": "shared", "experts.gate_up_proj":
    "experts.gate_up", "experts.down_proj": "experts.down", "mlp": "feed_forward", "mtp_block": "block",
    "post_norm": "norm",
}


def renamed(state):
    out = {}
    for key, value in state.items():
        for theirs, ours in RENAMED.items():
            key = key.replace(theirs, ours)
        out[key.removeprefix("model.")] = value
    return out


@pytest.fixture(scope="module")
def models():
    """transformers' model, its MTP model, and ours with their weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    mla = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(
        **sizes, **mla, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1,
        n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        first_k_dense_replace=1, num_mtp_layers=1, pad_token_id=None)).eval()
    their_mtp = MtpModel(theirs, 1).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for module in (theirs, their_mtp.layers):
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if "inv_freq" not in name:
                    tensor.normal_(1.0 if "norm" in name else 0.0, 0.2)
    ours = build_model(lm_config(
        vocab_size=97, num_layers=3, schedule=ScheduleConfig(full="mla", ratio=0), mtp=MTPConfig(depth=1),
        mixers={"mla": MLAConfig(num_heads=2, **mla, norm_eps=1e-6, rope=RopeConfig(kind="interleaved"))},
        feed_forward=MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, num_shared_experts=1,
                               dense_layers=[0], intermediate_size=48, router="sigmoid", num_groups=4, topk_groups=2,
                               routed_scaling_factor=2.5, correction_bias=True))).eval()
    module = {f"mtp.{key}": value for key, value in their_mtp.layers.state_dict().items()}
    ours.load_state_dict(renamed({**theirs.state_dict(), **module}))
    return theirs, their_mtp, ours


def test_logits_and_the_hidden_state_one_token_further(models):
    theirs, their_mtp, ours = models
    ids = torch.randint(97, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h = theirs.model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(ours(ids).logits, theirs.lm_head(h), rtol=0, atol=2e-5)
        h, told = h[:, :-1], ids[:, 1:]
        expected = their_mtp.forward_layer(0, h, torch.arange(1, 24)[None], None, input_ids=told)
        found, _ = ours.mtp[0](h, SequenceInfo.make(1, 23, torch.device("cpu")), ours.embed(told))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
