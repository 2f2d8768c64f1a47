"""Block attention against the sparse layers of transformers, weights copied over, fp32.

Ours and theirs cut blocks alike where a row is one document without padding in front: theirs count slots of the row,
ours tokens of the document. Equal scores go to the earlier block here and to any there; random weights have none.
"""

from __future__ import annotations

import pytest
import torch

from hybridlm.model.mixers import BlockAttentionConfig
from hybridlm.model.mixers.selectors import IndexHeadsSelectorConfig
from hybridlm.model.rope import RopeConfig
from tests.support.layer_parity import (
    BATCH,
    HIDDEN,
    LENGTH,
    TOLERANCE,
    causal_mask,
    ours,
    positions,
    random_weights,
    renamed,
    token_inputs,
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def minimax_m3(topk: int, local: int):
    """A sparse layer of MiniMax-M3 with blocks of 8 tokens, its rotary tables and its config."""
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as hf
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

    config = MiniMaxM3VLTextConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        index_n_heads=2, index_head_dim=12, index_block_size=8, index_topk_blocks=topk, index_local_blocks=local,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        layer_types=["minimax_m3_sparse"], attn_implementation="eager")
    layer = hf.MiniMaxM3VLAttention(config, 0)
    random_weights(layer)
    return layer, hf.MiniMaxM3VLRotaryEmbedding(config)(token_inputs(), positions())


@pytest.mark.parametrize(("topk", "local"), [(3, 1), (4, 2), (1, 1), (9, 1)])
def test_minimax_sparse_attention(topk, local):
    """Their norms scale by 1 + weight, ours are told so. Nine blocks hold the row: that is dense attention."""
    x = token_inputs()
    layer, tables = minimax_m3(topk, local)
    mixer = BlockAttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, block=8, topk=topk, local=local, qk_norm="head",
        rope=RopeConfig(theta=5e6, partial_rotary_factor=0.5), selector=IndexHeadsSelectorConfig(head_dim=12))
    expected = layer(x, tables, causal_mask())[0]
    found = ours(mixer, renamed(layer, {"indexer.": "selector."}), x, eps=1e-6, zero_centered=True)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_every_key_value_head_of_minimax_has_its_own_list():
    x = token_inputs()
    layer, tables = minimax_m3(3, 1)
    blocks = layer.indexer(x, tables, None, positions())
    assert blocks.shape == (BATCH, 2, LENGTH, 3)
    assert not torch.equal(blocks[:, 0].sort(-1).values, blocks[:, 1].sort(-1).values)


@pytest.mark.parametrize(("budget", "index_dim"), [(12, 16), (12, 20), (68, 16)])
def test_qwen_sparse_attention(budget, index_dim):
    """Index heads of any size rotate as many dims as a head of attention. 68 keys and the tail hold the row.

    Their queries and output gates come from one projection, per head the query and then its gate.
    """
    from transformers.models.qwen4_exp import modeling_qwen4_exp as hf
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    x = token_inputs()
    config = Qwen4ExpTextConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        indexer_n_heads=3, indexer_kv_heads=1, indexer_head_dim=index_dim, indexer_budget=budget,
        indexer_compress_ratio=4, layer_types=["indexed_attention"], attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
                         "mrope_section": [2, 1, 1]})
    layer = hf.Qwen4ExpTextAttention(config, 0)
    random_weights(layer)
    weights = renamed(layer, {"indexer.": "selector.", "q_layernorm": "q_norm", "k_layernorm": "k_norm"})
    both = weights.pop("q_proj.weight").view(4, 2, 16, HIDDEN)
    weights["q_proj.weight"], weights["g_proj.weight"] = (both[:, i].flatten(0, 1) for i in (0, 1))
    index = weights.pop("selector.index_qk_proj.weight")
    weights["selector.q_proj.weight"], weights["selector.k_proj.weight"] = index.split([3 * index_dim, index_dim])
    mixer = BlockAttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, block=4, topk=budget // 4, local=0, qk_norm="head",
        output_gate="element", rope=RopeConfig(theta=1e7, partial_rotary_factor=0.5),
        selector=IndexHeadsSelectorConfig(num_heads=3, head_dim=index_dim, lists_for="all", reduce="mean", relu=True))
    tables = hf.Qwen4ExpTextRotaryEmbedding(config)(x, positions()[None])
    expected = layer(x, tables, causal_mask())[0]
    found = ours(mixer, weights, x, eps=1e-6, zero_centered=True)
    torch.testing.assert_close(found, expected, **TOLERANCE)
