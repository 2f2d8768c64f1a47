"""Blocks by the product of a query with the mean of their keys.

    s_tj = q_t . mean over the block of k_s

Source: Lu et al. 2025, MoBA, section 2.2, and its code (moba_naive.py): per query head, unscaled, in fp32.
B rows, Q queries, H query heads, G key/value heads, R = H/G, K head dim, P blocks, L tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.block_selection import (
    BlockHeads,
    BlockIndex,
    Selector,
    SelectorConfig,
    SelectorInputs,
    group_queries,
    register_selector,
)
from hybridlm.model.mixers.common.entries import count_entries, count_seen_entries
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class MeanSelectorConfig(SelectorConfig):
    """Configuration of the selection by mean keys.

    Args:
        heads: `query` has a list per query head, as MoBA; `group` one per key/value head, by the sum of its scores.
    """

    kind: str = "mean"
    heads: Literal["query", "group"] = "query"

    def lists(self, heads: BlockHeads) -> int:
        return heads.num_heads if self.heads == "query" else heads.num_kv_heads

    def flops_per_token(self, context: LayerContext, heads: BlockHeads, context_length: int) -> dict[str, float]:
        seen = count_seen_entries(context_length, heads.block, heads.block)
        return {"scores": 2.0 * heads.num_heads * heads.head_dim * seen}

    def state_numbers(self, heads: BlockHeads, context_length: int) -> int:
        return sum(count_entries(context_length, heads.block, heads.block)) * heads.num_kv_heads * heads.head_dim


@register_selector("mean", MeanSelectorConfig)
class MeanSelector(Selector):
    """The module; it has no parameters."""

    def __init__(self, config: MeanSelectorConfig, context: LayerContext, heads: BlockHeads):
        super().__init__(config, context, heads)
        self.per_query_head = config.heads == "query"

    def features(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.k_BTGK

    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        return wide(features_BEL).mean(2).to(features_BEL.dtype)

    def queries(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.q_BTHK

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        q_BQGRK = group_queries(index.queries_BT[:, rows], self.heads.num_kv_heads)
        k_BPGK = wide(index.entries_BE)
        if self.per_query_head:
            return torch.einsum("bqgrk,bpgk->bqgrp", q_BQGRK, k_BPGK).flatten(2, 3)
        return torch.einsum("bqgk,bpgk->bqgp", q_BQGRK.sum(3), k_BPGK)
