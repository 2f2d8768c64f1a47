"""Keys of a prompt by one of three patterns per head: first and newest tokens, columns and diagonals, or blocks.

A column is a key that all later queries read, a diagonal a distance at which every query reads. The best of both are
those with most attention of the last queries of the prompt. Blocks are those of best product of mean queries and keys.

Source: Jiang et al. 2024, MInference 1.0 (arXiv 2407.02490), section 3, and its code for what is always read.
The paper chooses a head's pattern once, on one text; here each document chooses, by the attention that the keys hold.
T tokens of a document, Q queries of a piece, H query heads, K head dim, I blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridlm.evaluation.sparse.block_map import (
    BlockMapReader,
    block_means,
    diagonal_sums,
    last_queries,
    per_query_head,
    visible_blocks,
)
from hybridlm.evaluation.sparse.contract import BudgetMethod, KeyReader, register_sparse_method, visible_keys
from hybridlm.evaluation.sparse.fixed import FirstAndNewest
from hybridlm.evaluation.sparse.search import best_keys

VOTERS = 64  # last queries of the prompt, whose attention chooses columns and diagonals
BLOCK = 64  # tokens per block of the third pattern
SINKS, NEAREST = 30, 100  # columns and diagonals that are always read


@dataclass(frozen=True, kw_only=True)
class MInference(BudgetMethod):
    """One pattern per query head, with a document as one prompt.

    Args:
        budget: keys of each pattern: a fifth of them first tokens or columns, the rest newest tokens or diagonals; or
            as many blocks of 64 tokens as it holds, at least one.
        pattern: `choose` takes for each head of a document the one whose keys hold most attention; `a_shape`,
            `vertical_slash` and `block_sparse` take that one for all.
    """

    pattern: Literal["choose", "a_shape", "vertical_slash", "block_sparse"] = "choose"

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        q_HTK, k_HTK = per_query_head(q_THK, k_TGK)
        makers = {"a_shape": _a_shape, "vertical_slash": _VerticalSlash, "block_sparse": _blocks}
        if self.pattern != "choose":
            return makers[self.pattern](self.budget, q_HTK, k_HTK, scale, window)
        readers = [make(self.budget, q_HTK, k_HTK, scale, window) for make in makers.values()]
        return _Chosen(readers, q_HTK, k_HTK, scale, window)


def _parts(budget: int) -> tuple[int, int]:
    """Numbers of first tokens or columns, and of newest tokens or diagonals."""
    first = min(budget - 1, max(1, budget // 5))
    return first, budget - first


def _a_shape(budget: int, q_HTK: Tensor, k_HTK: Tensor, scale: float, window: int | None) -> KeyReader:
    return FirstAndNewest(*_parts(budget), window)


class _VerticalSlash(KeyReader):
    def __init__(self, budget: int, q_HTK: Tensor, k_HTK: Tensor, scale: float, window: int | None):
        columns, diagonals = _parts(budget)
        p_HQT = last_queries(q_HTK, k_HTK, VOTERS, scale, window)
        column_HT, diagonal_HT = p_HQT.sum(1), diagonal_sums(p_HQT)
        column_HT[:, : min(SINKS, columns // 2)] = torch.inf
        seen_T = visible_keys(slice(-VOTERS, None), q_HTK.shape[1], window, q_HTK.device).any(0)
        column_HT = column_HT.masked_fill(~seen_T, -torch.inf)
        diagonal_HT[:, : min(NEAREST, max(1, diagonals // 2))] = torch.inf
        self.columns_HT, self.diagonals_HT = best_keys(column_HT, columns), best_keys(diagonal_HT, diagonals)

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        s_T = torch.arange(scores_HQT.shape[2], device=scores_HQT.device)
        distance_QT = (s_T[rows, None] - s_T).clamp(min=0)
        return self.columns_HT[:, None] | self.diagonals_HT[:, distance_QT]


def _blocks(budget: int, q_HTK: Tensor, k_HTK: Tensor, scale: float, window: int | None) -> KeyReader:
    score_HII = torch.einsum("hik,hjk->hij", block_means(q_HTK, BLOCK), block_means(k_HTK, BLOCK))
    seen_II = visible_blocks(q_HTK.shape[1], BLOCK, BLOCK, window, q_HTK.device)
    return BlockMapReader(best_keys(score_HII.masked_fill(~seen_II, -torch.inf), max(1, budget // BLOCK)), BLOCK, BLOCK)


class _Chosen(KeyReader):
    """The pattern of each head whose keys hold most attention, over all queries of the document."""

    def __init__(self, readers: list[KeyReader], q_HTK: Tensor, k_HTK: Tensor, scale: float, window: int | None):
        heads, tokens = q_HTK.shape[:2]
        self.readers = readers
        held_XH = torch.zeros(len(readers), heads, dtype=q_HTK.dtype, device=q_HTK.device)
        for start in range(0, tokens, VOTERS):
            rows = slice(start, min(start + VOTERS, tokens))
            score_HQT = torch.einsum("hqk,htk->hqt", q_HTK[:, rows], k_HTK) * scale
            score_HQT = score_HQT.masked_fill(~visible_keys(rows, tokens, window, q_HTK.device), -torch.inf)
            p_HQT = score_HQT.softmax(-1)
            for index, reader in enumerate(readers):
                held_XH[index] += (p_HQT * reader.reads(rows, score_HQT)).sum((1, 2))  # type: ignore[operator]
        self.choice_H = held_XH.argmax(0)

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        masks_XHQT = torch.stack([reader.reads(rows, scores_HQT) for reader in self.readers])  # type: ignore[misc]
        heads = torch.arange(len(self.choice_H), device=scores_HQT.device)
        return masks_XHQT[self.choice_H, heads]


register_sparse_method("minference", MInference)
