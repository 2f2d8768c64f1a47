"""Rectified sparse attention: blocks by their bounds, and a dense pass over the newest tokens at regular intervals.

Source: Sun et al. 2025, ReSA (arXiv 2506.04108), sections 2.2 and 2.3, and the published code: one list per key/value
head by the mean query of its heads, blocks of 16 tokens, a tenth of them but at least 16, a dense pass every 32 tokens.
T tokens of a document, Q queries of a piece, H query heads, G key/value heads, P blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.evaluation.sparse.contract import KeyReader, SparseMethod, register_sparse_method
from hybridlm.evaluation.sparse.pages import RunningBounds, seen_pages


@dataclass(frozen=True, kw_only=True)
class ReSA(SparseMethod):
    """The blocks of best bound, for all heads of a key/value head, with keys and values that are rectified.

    Args:
        every: tokens from one dense pass to the next, counted from the start of a document; 0: there is none.
        share: share of the blocks up to a query that it reads, rounded up.
        least: blocks that a query reads at least, where it has so many.
        local: newest blocks that are always among them, the query's own included.
        page: tokens per block.
    """

    every: int = 32
    share: float = 0.1
    least: int = 16
    local: int = 1
    page: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "every")
        self.require_at_least(1, "least", "local", "page")
        self.require_share("share")

    def rectified_every(self) -> int:
        return self.every

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return _BlockReader(self, q_THK, k_TGK)


class _BlockReader(KeyReader):
    def __init__(self, method: ReSA, q_THK: Tensor, k_TGK: Tensor):
        self.method = method
        groups = k_TGK.shape[1]
        self.copies = q_THK.shape[1] // groups
        self.q_GTK = q_THK.unflatten(1, (groups, -1)).mean(2).transpose(0, 1)
        self.bounds = RunningBounds(k_TGK.transpose(0, 1), method.page)

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        size, tokens = self.method.page, scores_HQT.shape[2]
        score_GQP = self.bounds.scores(self.q_GTK[:, rows], rows)
        seen_QP = seen_pages(scores_HQT, size)
        own_Q1 = (torch.arange(tokens, device=seen_QP.device)[rows] // size)[:, None]
        local_QP = torch.arange(seen_QP.shape[1], device=own_Q1.device) > own_Q1 - self.method.local
        score_GQP = score_GQP.masked_fill(local_QP, torch.inf).masked_fill(~seen_QP, -torch.inf)
        rank_GQP = score_GQP.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        read_GQP = (rank_GQP < self._count(seen_QP.sum(-1))[:, None]) & seen_QP
        return read_GQP.repeat_interleave(self.copies, 0).repeat_interleave(size, -1)[..., :tokens]

    def _count(self, seen_Q: Tensor) -> Tensor:
        """Blocks that a query reads of those that it sees."""
        counts = [max(math.ceil(seen * self.method.share), min(seen, self.method.least)) for seen in seen_Q.tolist()]
        return torch.tensor(counts, device=seen_Q.device)


register_sparse_method("resa", ReSA)
