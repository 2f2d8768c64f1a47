"""Blocks of a prompt by one of two patterns per head, chosen by what its last queries attend to.

    true = attention of the last block of queries, its mean summed over blocks of keys
    estimated = softmax_j(mean of these queries . mean k of block j / sqrt(K))

A head whose two distributions are close (square root of the Jensen-Shannon divergence below `tau`) is query-aware: of
softmax_j(mean q_i . mean k_j / sqrt(K)) over all pairs of blocks the largest are read, as far as they sum up to `gamma`
of all. Any other head reads columns and diagonals: as many as hold `gamma` of the attention of the last queries.

Source: Lai et al. 2025, FlexPrefill (arXiv 2502.20766), section 3, in the form of its code: columns and diagonals are
counted in tokens and taken in blocks, and a query-aware head keeps the smallest number of these.
T tokens of a document, Q queries of a block, H query heads, K head dim, I blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.evaluation.sparse.block_map import (
    BlockMapReader,
    block_means,
    block_sums,
    diagonal_sums,
    last_queries,
    per_query_head,
    visible_blocks,
)
from hybridlm.evaluation.sparse.contract import KeyReader, SparseMethod, register_sparse_method


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(SparseMethod):
    """Query-aware blocks or columns and diagonals, per query head, with a document as one prompt.

    Args:
        gamma: share of the attention that is read.
        tau: distance below which a head is query-aware; 0 makes none so.
        least: tokens of columns and of diagonals that are read at least. Shorter documents are dense, and those of at
            most two blocks.
        block: tokens per block.
    """

    gamma: float = 0.9
    tau: float = 0.1
    least: int = 1024
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "least", "block")
        self.require_at_least(0, "tau")
        self.require_share("gamma")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        q_HTK, k_HTK = per_query_head(q_THK, k_TGK)
        blocks = -(-len(q_THK) // self.block)
        if blocks <= max(2, math.ceil(self.least / self.block)):
            everything = torch.ones(len(q_HTK), blocks, blocks, dtype=torch.bool, device=q_THK.device)
            return BlockMapReader(everything, self.block, self.block)
        return BlockMapReader(self.block_map(q_HTK, k_HTK, scale, window), self.block, self.block)

    def block_map(self, q_HTK: Tensor, k_HTK: Tensor, scale: float, window: int | None) -> Tensor:
        """Decide which blocks are read, [H, I, I]."""
        size = self.block
        p_HQT = last_queries(q_HTK, k_HTK, size, scale, window)
        column_HT, diagonal_HT = p_HQT.mean(1), diagonal_sums(p_HQT) / p_HQT.shape[1]
        k_HIK = block_means(k_HTK, size)
        seen_II = visible_blocks(q_HTK.shape[1], size, size, window, q_HTK.device)
        score_HI = torch.einsum("hk,hik->hi", q_HTK[:, -size:].mean(1), k_HIK) * scale
        estimated_HI = score_HI.masked_fill(~seen_II[-1], -torch.inf).softmax(-1)
        aware_H = _distance(estimated_HI, block_sums(column_HT, size)) < self.tau
        least = math.ceil(self.least / size)
        block_I = torch.arange(k_HIK.shape[1], device=q_HTK.device)
        columns_HI = self._best_blocks(column_HT, aware_H, least, seen_II[-1])
        # Diagonals in blocks from the newest key back; the first block of distances holds the diagonal itself.
        near_I = (block_I - 1) * size + 1 < (q_HTK.shape[1] if window is None else window)
        slashes_HI = self._best_blocks(diagonal_HT, aware_H, least, near_I)
        distance_II = block_I[:, None] - block_I
        found_HII = columns_HI[:, None] | slashes_HI[:, distance_II.clamp(min=0)]
        aware_HII = self._query_aware(block_means(q_HTK, size), k_HIK, scale, seen_II)
        found_HII = found_HII | (aware_HII & aware_H[:, None, None])
        found_HII[:, 0, 0] = True
        return found_HII & seen_II

    def _best_blocks(self, mass_HT: Tensor, aware_H: Tensor, least: int, seen_I: Tensor) -> Tensor:
        """The first block and those of most mass, [H, I]: as many as the tokens that hold `gamma` would fill, if seen.
        """
        sorted_HT = mass_HT.sort(dim=-1, descending=True).values
        tokens_H = (sorted_HT.cumsum(-1) <= self.gamma).sum(-1) + 1
        blocks_HI = block_sums(mass_HT, self.block)
        count_H = (tokens_H // self.block + 1).clamp(min=least, max=blocks_HI.shape[1]).masked_fill(aware_H, least)
        blocks_HI[:, 0] = torch.inf
        order_HI = blocks_HI.masked_fill(~seen_I, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        rank_I = torch.arange(blocks_HI.shape[1], device=mass_HT.device)
        return torch.zeros_like(blocks_HI, dtype=torch.bool).scatter_(-1, order_HI, rank_I < count_H[:, None])

    def _query_aware(self, q_HIK: Tensor, k_HIK: Tensor, scale: float, seen_II: Tensor) -> Tensor:
        """The pairs of blocks of most estimated attention, [H, I, I], as far as they sum up to `gamma` of all."""
        blocks = q_HIK.shape[1]
        score_HII = torch.einsum("hik,hjk->hij", q_HIK, k_HIK) * scale
        p_HX = score_HII.masked_fill(~seen_II, -torch.inf).softmax(-1).flatten(1)
        sorted_HX, order_HX = p_HX.sort(dim=-1, descending=True, stable=True)
        kept_HX = sorted_HX.cumsum(-1) <= self.gamma * blocks
        return torch.zeros_like(kept_HX).scatter_(-1, order_HX, kept_HX).unflatten(1, (blocks, blocks))


def _distance(p_HI: Tensor, q_HI: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, [H]."""
    middle_HI = (p_HI + q_HI) / 2
    parts = [torch.xlogy(x, x / middle_HI.clamp(min=torch.finfo(x.dtype).tiny)).sum(-1) for x in (p_HI, q_HI)]
    return ((parts[0] + parts[1]) / 2).clamp(min=0).sqrt()


register_sparse_method("flexprefill", FlexPrefill)
