"""Blocks by an upper bound of the product of a query with any of their keys.

    s_tj = sum_c max(q_tc max_s k_sc, q_tc min_s k_sc)          s over the block, c over the dims

Source: Tang et al. 2024, Quest, section 3.3.
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
class BoundSelectorConfig(SelectorConfig):
    """Configuration of the selection by bounds.

    Args:
        heads: `query` has a list per query head, as Quest; `group` one per key/value head, by the sum of its bounds.
    """

    kind: str = "bound"
    heads: Literal["query", "group"] = "query"

    def lists(self, heads: BlockHeads) -> int:
        return heads.num_heads if self.heads == "query" else heads.num_kv_heads

    def flops_per_token(self, context: LayerContext, heads: BlockHeads, context_length: int) -> dict[str, float]:
        seen = count_seen_entries(context_length, heads.block, heads.block)
        return {"scores": 4.0 * heads.num_heads * heads.head_dim * seen}

    def state_numbers(self, heads: BlockHeads, context_length: int) -> int:
        entries, open_tokens = count_entries(context_length, heads.block, heads.block)
        return (2 * entries + open_tokens) * heads.num_kv_heads * heads.head_dim


@register_selector("bound", BoundSelectorConfig)
class BoundSelector(Selector):
    """The module; it has no parameters."""

    def __init__(self, config: BoundSelectorConfig, context: LayerContext, heads: BlockHeads):
        super().__init__(config, context, heads)
        self.per_query_head = config.heads == "query"

    def features(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.k_BTGK

    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        return torch.cat([features_BEL.amax(2), features_BEL.amin(2)], -1)

    def queries(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.q_BTHK

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        q_BQGRK = group_queries(index.queries_BT[:, rows], self.heads.num_kv_heads)
        parts_BQGRX = torch.cat([q_BQGRK.clamp(min=0), q_BQGRK.clamp(max=0)], -1)
        bounds_BPGX = wide(index.entries_BE)
        if self.per_query_head:
            return torch.einsum("bqgrx,bpgx->bqgrp", parts_BQGRX, bounds_BPGX).flatten(2, 3)
        return torch.einsum("bqgx,bpgx->bqgp", parts_BQGRX.sum(3), bounds_BPGX)
