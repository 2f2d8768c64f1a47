"""Whole mixers against the layer classes of transformers, weights copied over, fp32.

Each test maps the published checkpoint layout to ours, which is also what an importer has to do.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybridlm.model.mixers import (
    AttentionConfig,
    DeltaRuleConfig,
    IndexerConfig,
    LinearAttentionConfig,
    MLAConfig,
    build_mixer,
)
from hybridlm.model.rope import RopeConfig, YarnConfig
from hybridlm.model.sequence import SequenceInfo
from tests.support.layer_parity import (
    HIDDEN,
    LENGTH,
    TOLERANCE,
    causal_mask,
    context,
    ours,
    positions,
    random_weights,
    renamed,
    token_inputs,
)


def split_conv(weights: dict[str, Tensor], widths: list[int]) -> None:
    """One fused convolution [q | k | v] to three."""
    for name, part in zip("qkv", weights.pop("conv1d.weight")[:, 0].split(widths), strict=True):
        weights[f"{name}_conv"] = part


@pytest.fixture
def x() -> Tensor:
    return token_inputs()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_kimi_delta_attention(x):
    from transformers.models.kimi_linear import modeling_kimi_linear as hf

    config = kimi_config()
    layer = hf.KimiLinearDeltaAttention(config, 0)
    random_weights(layer)
    weights = renamed(layer, {"forget_gate.": ""})
    weights["A_log"] = weights["A_log"].flatten()
    split_conv(weights, [64] * 3)
    mixer = DeltaRuleConfig(num_heads=4, head_dim=16, gate_rank=16, output_gate="sigmoid", output_gate_rank=16)
    torch.testing.assert_close(ours(mixer, weights, x), layer(x), **TOLERANCE)


def test_kimi_full_layer_without_rope(x):
    from transformers.models.kimi_linear import modeling_kimi_linear as hf

    layer = hf.KimiLinearAttention(kimi_config(), 3)
    random_weights(layer)
    weights = renamed(layer, {"kv_a_proj_with_mqa": "kv_a_proj", "a_layernorm": "a_norm"})
    mixer = MLAConfig(num_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
                      rope=RopeConfig(kind="none"), norm_eps=1e-6)
    torch.testing.assert_close(ours(mixer, weights, x), layer(x, causal_mask())[0], **TOLERANCE)


def kimi_config():
    from transformers import KimiLinearConfig

    return KimiLinearConfig(hidden_size=HIDDEN, num_hidden_layers=4, num_attention_heads=4, kv_lora_rank=32,
                            qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, num_key_value_heads=4,
                            linear_head_dim=16, linear_num_heads=4, pad_token_id=None, attn_implementation="eager")


def qwen3_next_config():
    from transformers import Qwen3NextConfig

    return Qwen3NextConfig(hidden_size=HIDDEN, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                           head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
                           linear_value_head_dim=24, rms_norm_eps=1e-5, attn_implementation="eager")


def test_qwen3_next_gated_deltanet(x):
    from transformers.models.qwen3_next import modeling_qwen3_next as hf

    layer = hf.Qwen3NextGatedDeltaNet(qwen3_next_config(), 0)
    random_weights(layer)
    weights = renamed(layer, {"out_proj": "o_proj", "norm.": "o_norm."})
    # Rows of the packed projections stand by key head: [q | k | 2 value heads | 2 gates] and [b b | a a].
    packed = weights.pop("in_proj_qkvz.weight").view(2, -1, HIDDEN).split([16, 16, 48, 48], 1)
    for name, rows in zip("qkvg", packed, strict=True):
        weights[f"{name}_proj.weight"] = rows.reshape(-1, HIDDEN)
    for name, rows in zip("ba", weights.pop("in_proj_ba.weight").view(2, -1, HIDDEN).split([2, 2], 1), strict=True):
        weights[f"{name}_proj.weight"] = rows.reshape(-1, HIDDEN)
    split_conv(weights, [32, 32, 96])
    mixer = DeltaRuleConfig(num_heads=2, num_value_heads=4, head_dim=16, value_head_dim=24, decay="scalar")
    torch.testing.assert_close(ours(mixer, weights, x, zero_centered=True), layer(x), **TOLERANCE)


def test_qwen3_next_gated_attention(x):
    from transformers.models.qwen3_next import modeling_qwen3_next as hf

    config = qwen3_next_config()
    layer = hf.Qwen3NextAttention(config, 3)
    random_weights(layer)
    weights = renamed(layer, {})
    queries, gates = weights.pop("q_proj.weight").view(4, 2, 32, HIDDEN).unbind(1)
    weights |= {"q_proj.weight": queries.reshape(-1, HIDDEN), "g_proj.weight": gates.reshape(-1, HIDDEN)}
    rope = config.rope_parameters
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm="head", output_gate="element",
                            rope=RopeConfig(theta=rope["rope_theta"], partial_rotary_factor=0.25))
    tables = hf.Qwen3NextRotaryEmbedding(config)(x, positions())
    expected = layer(x, tables, causal_mask())[0]
    torch.testing.assert_close(ours(mixer, weights, x, zero_centered=True), expected, **TOLERANCE)


def minimax_config():
    from transformers import MiniMaxConfig

    return MiniMaxConfig(hidden_size=HIDDEN, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=16, block_size=32, layer_types=["linear_attention"] * 4 + ["full_attention"],
                         attn_implementation="eager")


@pytest.mark.parametrize("layer_index", [0, 2, 3])
def test_minimax_lightning_attention(x, layer_index):
    from transformers.models.minimax import modeling_minimax as hf

    layer = hf.MiniMaxLightningAttention(minimax_config(), layer_index)
    random_weights(layer)
    weights = renamed(layer, {"out_proj": "o_proj", "output_gate": "g_proj", "norm.": "o_norm."},
                      drop=("slope_rate", "query_decay", "key_decay", "diagonal_decay"))
    rows = weights.pop("qkv_proj.weight").view(4, 3, 16, HIDDEN).unbind(1)
    weights |= {f"{name}_proj.weight": part.reshape(-1, HIDDEN) for name, part in zip("qkv", rows, strict=True)}
    result = ours(LinearAttentionConfig(num_heads=4, head_dim=16), weights, x, layer_index=layer_index, num_layers=5)
    torch.testing.assert_close(result, layer(x, None, None)[0], **TOLERANCE)


def test_minimax_full_layer(x):
    from transformers.models.minimax import modeling_minimax as hf

    config = minimax_config()
    layer = hf.MiniMaxAttention(config, 4)
    random_weights(layer)
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16,
                            rope=RopeConfig(theta=config.rope_parameters["rope_theta"]))
    expected = layer(x, hf.MiniMaxRotaryEmbedding(config)(x, positions()), causal_mask())[0]
    torch.testing.assert_close(ours(mixer, renamed(layer, {}), x), expected, **TOLERANCE)


def test_minimax_m2_attention(x):
    from transformers import MiniMaxM2Config
    from transformers.models.minimax_m2 import modeling_minimax_m2 as hf

    config = MiniMaxM2Config(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             head_dim=16, rotary_dim=8, rms_norm_eps=1e-5, attn_implementation="eager")
    layer = hf.MiniMaxM2Attention(config, 0)
    random_weights(layer)
    rope = RopeConfig(theta=config.rope_parameters["rope_theta"], partial_rotary_factor=0.5)
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm="full", rope=rope)
    expected = layer(x, hf.MiniMaxM2RotaryEmbedding(config)(x, positions()), causal_mask())[0]
    torch.testing.assert_close(ours(mixer, renamed(layer, {}), x), expected, **TOLERANCE)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 0.5, "rope_theta": 10000.0}


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("topk", [9, 128], ids=["selected", "everything"])
def test_mla_with_indexer(x, name, topk):
    hf, config = sparse_mla(name, topk)
    prefix = {"deepseek_v32": "DeepseekV32", "glm_moe_dsa": "GlmMoeDsa"}[name]
    layer = getattr(hf, f"{prefix}Attention")(config, 0)
    random_weights(layer)
    weights = renamed(layer, {"kv_a_proj_with_mqa": "kv_a_proj", "a_layernorm": "a_norm",
                              "indexer.wq_b": "indexer.q_proj", "indexer.wk": "indexer.k_proj"})
    yarn = YarnConfig(factor=4.0, original_max_position=32, mscale=1.0, mscale_all_dim=0.5)
    indexer = IndexerConfig(num_heads=32, head_dim=16, topk=topk,
                            rope_kind="interleaved" if name == "glm_moe_dsa" else "half")
    mixer = MLAConfig(num_heads=4, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
                      v_head_dim=12, norm_eps=1e-6, indexer=indexer,
                      rope=RopeConfig(kind="interleaved", scaling=yarn))
    tables = getattr(hf, f"{prefix}RotaryEmbedding")(config)(x, positions())
    expected = layer(x, tables, causal_mask())[0]
    torch.testing.assert_close(ours(mixer, weights, x), expected, **TOLERANCE)


@torch.no_grad()
def test_pooled_indexer_selects_as_in_glm_5_3(x):
    from transformers import Glm5NextTextConfig
    from transformers.models.glm5_next import modeling_glm5_next as hf

    config = Glm5NextTextConfig(hidden_size=HIDDEN, q_lora_rank=24, index_n_heads=32, index_head_dim=16, index_topk=8,
                                index_kpool=4, qk_rope_head_dim=0)
    indexer = hf.Glm5NextTextIndexer(config, 0)
    random_weights(indexer)
    indexer.double()
    mixer = build_mixer(MLAConfig(
        num_heads=4, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=0, v_head_dim=12,
        rope=RopeConfig(kind="none"),
        indexer=IndexerConfig(num_heads=32, head_dim=16, topk=8, pool=4, rope_kind="none")), context()).double()
    theirs = {"wq_b.weight": "q_proj.weight", "wk.weight": "k_proj.weight",
              "index_kpool_compress_gate": "pool.gate.weight", "index_kpool_compress_ape": "pool.bias"}
    mixer.indexer.load_state_dict({theirs.get(name, name): p for name, p in indexer.state_dict().items()})
    latent = torch.randn(x.shape[0], x.shape[1], 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seq = SequenceInfo.make(x.shape[0], x.shape[1], x.device)
    expected = indexer(x.double(), latent, torch.ones(x.shape[:2], dtype=torch.bool), None)
    found = mixer.indexer(x.double(), latent, seq)
    for ours_, theirs_ in zip(found.flatten(0, 1).tolist(), expected.flatten(0, 1).tolist(), strict=True):
        assert {s for s in ours_ if s >= 0} == {s for s in theirs_ if s >= 0}


def sparse_mla(name: str, topk: int):
    from transformers import DeepseekV32Config, GlmMoeDsaConfig
    from transformers.models.deepseek_v32 import modeling_deepseek_v32
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa

    hf, cls = {"deepseek_v32": (modeling_deepseek_v32, DeepseekV32Config),
               "glm_moe_dsa": (modeling_glm_moe_dsa, GlmMoeDsaConfig)}[name]
    config = cls(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24,
                 kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, index_topk=topk,
                 index_n_heads=32, index_head_dim=16, rope_parameters=dict(YARN), max_position_embeddings=128,
                 attn_implementation="eager")
    return hf, config


def bailing_config(**changes):
    from transformers import BailingHybridConfig

    return BailingHybridConfig(hidden_size=HIDDEN, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
                               kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
                               linear_num_heads=4, linear_head_dim=16, rms_norm_eps=1e-5, pad_token_id=None,
                               attn_implementation="eager", **changes)


@pytest.mark.parametrize("safe", [True, False])
def test_bailing_delta_attention(x, safe):
    from transformers.models.bailing_hybrid import modeling_bailing_hybrid as hf

    config = bailing_config(kda_safe_gate=safe)
    layer = hf.BailingHybridDeltaAttention(config, 0)
    random_weights(layer)
    weights = renamed(layer, {"forget_gate.": ""})
    split_conv(weights, [64] * 3)
    mixer = DeltaRuleConfig(num_heads=4, head_dim=16, gate="lower_bounded" if safe else "softplus", gate_dtype="model",
                            lower_bound=config.kda_lower_bound, output_gate="sigmoid")
    torch.testing.assert_close(ours(mixer, weights, x), layer(x), **TOLERANCE)


def test_bailing_full_layer_with_head_gate(x):
    from transformers.models.bailing_hybrid import modeling_bailing_hybrid as hf

    config = bailing_config()
    layer = hf.BailingHybridAttention(config, 5)
    random_weights(layer)
    weights = renamed(layer, {"kv_a_proj_with_mqa": "kv_a_proj", "a_layernorm": "a_norm"})
    mixer = MLAConfig(num_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
                      rope=RopeConfig(kind="interleaved", theta=config.rope_parameters["rope_theta"]), norm_eps=1e-6,
                      output_gate="head")
    expected = layer(x, hf.BailingHybridRotaryEmbedding(config)(x, positions()), causal_mask())[0]
    torch.testing.assert_close(ours(mixer, weights, x), expected, **TOLERANCE)


def test_olmo_hybrid_gated_deltanet(x):
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as hf

    config = OlmoHybridConfig(hidden_size=HIDDEN, num_hidden_layers=4, num_attention_heads=4, linear_num_key_heads=4,
                              linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=24,
                              pad_token_id=None)
    layer = hf.OlmoHybridGatedDeltaNet(config, 0)
    random_weights(layer)
    weights = renamed(layer, {})
    split_conv(weights, [48, 48, 96])
    mixer = DeltaRuleConfig(num_heads=4, head_dim=12, value_head_dim=24, decay="scalar", beta_scale=2.0, norm_eps=1e-5)
    torch.testing.assert_close(ours(mixer, weights, x), layer(x), **TOLERANCE)


@pytest.mark.parametrize("window", [None, 16])
def test_gpt_oss_attention_with_sinks(x, window):
    from transformers import GptOssConfig
    from transformers.models.gpt_oss import modeling_gpt_oss as hf

    rope = {k: v for k, v in YARN.items() if not k.startswith("mscale")} | {"truncate": False}
    kind = "full_attention" if window is None else "sliding_attention"
    config = GptOssConfig(hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                          head_dim=16, layer_types=[kind], sliding_window=16, rope_parameters=rope,
                          attn_implementation="eager")
    layer = hf.GptOssAttention(config, 0)
    random_weights(layer)
    yarn = YarnConfig(factor=4.0, original_max_position=32, truncate=False)
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=True, o_bias=True, sinks=True,
                            window=window, rope=RopeConfig(scaling=yarn))
    expected = layer(x, hf.GptOssRotaryEmbedding(config)(x, positions()), causal_mask(window=window))[0]
    torch.testing.assert_close(ours(mixer, renamed(layer, {}), x), expected, **TOLERANCE)


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_gemma3_attention(x, layer_type):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3 import modeling_gemma3 as hf

    window = 16 if layer_type == "sliding_attention" else None
    config = Gemma3TextConfig(hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                              head_dim=16, query_pre_attn_scalar=16, layer_types=[layer_type], sliding_window=16,
                              rms_norm_eps=1e-5, attn_implementation="eager")
    layer = hf.Gemma3Attention(config, 0)
    random_weights(layer)
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm="head", window=window,
                            rope=RopeConfig(theta=config.rope_parameters[layer_type]["rope_theta"]))
    rotation = hf.Gemma3RotaryEmbedding(config)(x, positions(), layer_type)
    expected = layer(x, rotation, causal_mask(window=window))[0]
    torch.testing.assert_close(ours(mixer, renamed(layer, {}), x, zero_centered=True), expected, **TOLERANCE)


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_command_a_attention(x, layer_type):
    from transformers import Cohere2Config
    from transformers.models.cohere2 import modeling_cohere2 as hf

    window = 16 if layer_type == "sliding_attention" else None
    config = Cohere2Config(hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                           layer_types=[layer_type], sliding_window=16, attn_implementation="eager")
    layer = hf.Cohere2Attention(config, 0)
    random_weights(layer)
    rope = RopeConfig(kind="none") if window is None else RopeConfig(
        kind="interleaved", theta=config.rope_parameters["rope_theta"])
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, window=window, rope=rope)
    expected = layer(x, hf.Cohere2RotaryEmbedding(config)(x, positions()), causal_mask(window=window))[0]
    torch.testing.assert_close(ours(mixer, renamed(layer, {}), x), expected, **TOLERANCE)


@pytest.mark.parametrize("rotated", [True, False])
def test_mistral_large4_layers_read_the_latents_of_an_earlier_one(x, rotated):
    """All keys selected, and the learned scales of queries and frequencies at their neutral values."""
    from transformers.models.mistral_large4 import modeling_mistral_large4 as hf

    config = hf.MistralLarge4TextConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, index_topk=LENGTH, index_n_heads=2, index_head_dim=16,
        kv_source_layers=[0, 0], no_rope_layers=[int(rotated)] * 2, indexer_types=["full", "shared"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager")
    layers = [hf.MistralLarge4TextAttention(config, index) for index in range(2)]
    nope, rope = (8, 8) if rotated else (16, 0)
    first = MLAConfig(num_heads=4, kv_lora_rank=32, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=16,
                      rope=RopeConfig(kind="interleaved" if rotated else "none"))
    mixers = [first, replace(first, latent_source=0)]
    seq, shared, chosen = SequenceInfo.make(*x.shape[:2], x.device), {}, None
    rotation = hf.MistralLarge4TextRotaryEmbedding(config)(x, positions())
    for index, (layer, mixer) in enumerate(zip(layers, mixers, strict=True)):
        random_weights(layer, seed=index)
        layer.softmax_scaling.scale.data.zero_()
        layer.softmax_scaling.bias.data.fill_(1.0)
        inside = replace(context(layer_index=index, num_layers=2), layers=["0", "1"],
                         mixers={"0": mixers[0], "1": mixers[1]})
        ours = build_mixer(mixer, inside)
        names = {"kv_a_proj_with_mqa": "kv_a_proj", "a_layernorm": "a_norm"}
        ours.load_state_dict(renamed(layer, names, drop=("indexer", "softmax_scaling")))
        expected, _, chosen = layer(x, rotation, causal_mask(), shared, positions(), prev_topk_indices=chosen)
        torch.testing.assert_close(ours(x, seq)[0], expected, **TOLERANCE)
