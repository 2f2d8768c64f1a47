"""The blocks of keys that hold most of a layer's own attention: chosen exactly, for later layers that read them alone.

    p_ts = softmax_s(q_t . k_s / sqrt(K)) per query head
    m_tj = maximum or sum of p_ts over the tokens s of block j and over the query heads of one key/value head

No proxy is scored: m comes from the attention that the layer computes anyway. It is computed again here, piece by piece
of queries, and nothing of size T * S is kept.

Sources: HySparse (arXiv 2602.03560: blocks, maxima); HySparse2 (arXiv 2609.26368: tokens, which are blocks of one).
B rows, T queries, S keys, H query heads, G key/value heads, K head dim, P blocks, N blocks per list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.mixers.common.block_selection import (
    BlockBudget,
    BlockIndex,
    check_budget,
    choose_blocks,
    fill_block_sizes,
)
from hybridlm.model.mixers.common.cost import count_block_keys, count_visible_keys
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.indexer import longest_document
from hybridlm.model.mixers.common.selector_loss import KeyTargets, Pooling
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind
from hybridlm_kernels import selected_attention
from hybridlm_kernels.precision import wide

# What `ChosenBlocksConfig.choose` returns.
CHOSEN_BLOCKS = SharedKind("the blocks that attention chooses", gradient=False)


@dataclass(kw_only=True)
class ChosenBlocksConfig:
    """Configuration of the choice of blocks by the exact attention of a layer, for later layers.

    Args:
        block: tokens per block, counted from the start of the document; 1 chooses tokens.
        topk: blocks that a token of a later layer reads, its own and those of `first` and `local` included.
        first: first blocks of the document that are always read.
        local: newest blocks that are always read, the token's own included.
        pooling: attention is pooled over the tokens of a block by its `max` or its `sum`.
        heads: and over the query heads of one key/value head by its `max` or its `sum`.
    """

    block: int = 64
    topk: int = 16
    first: int = 0
    local: int = 1
    pooling: Pooling = "max"
    heads: Pooling = "max"

    def __post_init__(self) -> None:
        check_budget(self.block, self.budget)
        require(self.local > 0, "local", "must hold the token's own block", got=self.local, expected="at least 1")

    @property
    def budget(self) -> BlockBudget:
        """Number of blocks that are read."""
        return BlockBudget(self.topk, self.first, self.local)

    @classmethod
    def fill_sizes(cls, options: Mapping[str, Any], max_position: int) -> dict[str, Any]:
        """`options` with the block and the budget that they leave open, as for attention to selected blocks."""
        return fill_block_sizes(options, max_position)

    def selects(self, context_length: int) -> bool:
        """Whether anything is left out of a context of so many tokens."""
        return context_length > self.topk * self.block

    def read_keys(self, context_length: int) -> float:
        """Mean number of keys that a token of a later layer reads."""
        if not self.selects(context_length):
            return count_visible_keys(context_length)
        return count_block_keys(context_length, self.block, self.topk, True)

    def choose(self, q_BTHK: Tensor, k_BSGK: Tensor, seq: SequenceInfo, sinks_H: Tensor | None = None) -> Tensor | None:
        """Choose the blocks of each query; equal masses go to the earlier block.

        Args:
            q_BTHK: queries of the attention.
            k_BSGK: its keys of the tokens held here, those of the decode state before them.
            seq: positions and borders of the documents.
            sinks_H: logits of its sinks.

        Returns:
            Numbers of blocks in the query's document, int64 [B, T, G, N]: ascending, -1 for none, the query's own last.
            Blocks of one token are named by its place in the row. None where every document fits into the budget.
        """
        keys = k_BSGK.shape[1] if seq.shard is None else seq.shard.history_length
        if not self.selects(longest_document(keys, seq)):
            return None
        k_BSGK = seq.history(k_BSGK.detach())
        attention = KeyTargets(wide(q_BTHK.detach()), wide(k_BSGK), self.pooling,
                               None if sinks_H is None else wide(sinks_H.detach()))
        windows = EntryWindows.of(seq, q_BTHK, k_BSGK.shape[1], self.block, self.block)
        masses = AttentionMasses(attention, self.heads, k_BSGK.shape[2], self.block)
        index = BlockIndex(attention.q_BTHK, attention.k_BSGK, windows, windows)
        chosen_BTGN = choose_blocks(masses, index, self.budget)
        if self.block > 1:
            return chosen_BTGN
        begin_BT11 = windows.begin_BT[:, :, None, None]
        return torch.where(chosen_BTGN < 0, chosen_BTGN, chosen_BTGN + begin_BT11)

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, chosen_BTGN: Tensor, seq: SequenceInfo,
               sinks_H: Tensor | None = None) -> Tensor:
        """Attend to the keys of the chosen blocks.

        Args:
            q_BTHK: queries of a later layer.
            k_BSGK: keys of the tokens held here, those of the decode state before them.
            v_BSGK: their values.
            chosen_BTGN: from `choose`.
            seq: positions and borders of the documents.
            sinks_H: logits that take part in the softmax and carry no value.

        Returns:
            Outputs [B, T, H, K].
        """
        k_BSGK, v_BSGK = seq.history(k_BSGK), seq.history(v_BSGK)
        if self.block > 1:
            return selected_attention(q_BTHK, k_BSGK, v_BSGK, chosen_BTGN, block=self.block, sinks_H=sinks_H,
                                      cu_seqlens=seq.history_borders)[0]
        return selected_attention(q_BTHK, k_BSGK, v_BSGK, chosen_BTGN, sinks_H=sinks_H)[0]

    def list_bytes(self, groups: int) -> float:
        """Bytes per token of the lists of all key/value heads."""
        return 8.0 * groups * self.topk


class AttentionMasses:
    """Scores blocks by the attention that their tokens get, for `choose_blocks`: a list per key/value head."""

    def __init__(self, attention: KeyTargets, heads: Pooling, groups: int, block: int):
        """Score blocks of `block` tokens.

        Args:
            attention: its queries, keys, and pooling over the tokens of a block.
            heads: pooling over the query heads of one key/value head.
            groups: key/value heads G.
            block: tokens per block.
        """
        self.attention = attention
        self.heads = heads
        self.lists = groups
        self.scores_per_entry = attention.q_BTHK.shape[2] * block

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        """Masses [B, Q, G, P] of all blocks for the queries `rows`."""
        pooled_BQHP = self.attention.by_block(index.blocks, rows)[0]
        pooled_BQGRP = pooled_BQHP.unflatten(2, (self.lists, -1))
        return pooled_BQGRP.amax(3) if self.heads == "max" else pooled_BQGRP.sum(3)
