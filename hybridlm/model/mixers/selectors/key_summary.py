"""Selectors without parameters, whose entries are summaries of the keys of a block, scored by products with queries.

B rows, Q queries, H query heads, G key/value heads, R = H/G, K head dim, P blocks, L tokens of a block, X numbers of an
entry per key/value head.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal

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
)
from hybridlm.model.mixers.common.entries import count_entries, count_seen_entries
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class KeySummaryConfig(SelectorConfig):
    """Configuration of a selection by summaries of keys.

    Args:
        heads: `query` has a list per query head; `group` one per key/value head, by the sum of its heads' scores.
    """

    heads: Literal["query", "group"] = "query"
    keys_per_entry: ClassVar[int] = 1  # X over K

    def lists(self, heads: BlockHeads) -> int:
        return heads.num_heads if self.heads == "query" else heads.num_kv_heads

    def flops_per_token(self, context: LayerContext, heads: BlockHeads, context_length: int) -> dict[str, float]:
        seen = count_seen_entries(context_length, heads.block, heads.block)
        return {"scores": 2.0 * self.keys_per_entry * heads.num_heads * heads.head_dim * seen}

    def state_numbers(self, heads: BlockHeads, context_length: int) -> int:
        entries, open_tokens = count_entries(context_length, heads.block, heads.block)
        return (self.keys_per_entry * entries + open_tokens) * heads.num_kv_heads * heads.head_dim


class KeySummary(Selector):
    """The module; it has no parameters. `combine` makes the entries."""

    def __init__(self, config: KeySummaryConfig, context: LayerContext, heads: BlockHeads):
        super().__init__(config, context, heads)
        self.per_query_head = config.heads == "query"

    @abc.abstractmethod
    def query_parts(self, q_BQGRK: Tensor) -> Tensor:
        """Make the factors of the entries, [B, Q, G, R, X], of queries."""

    def features(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.k_BTGK

    def queries(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.q_BTHK

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        part_BQGRX = self.query_parts(group_queries(index.queries_BT[:, rows], self.heads.num_kv_heads))
        entry_BPGX = wide(index.entries_BE)
        if self.per_query_head:
            return torch.einsum("bqgrx,bpgx->bqgrp", part_BQGRX, entry_BPGX).flatten(2, 3)
        return torch.einsum("bqgx,bpgx->bqgp", part_BQGRX.sum(3), entry_BPGX)
