"""Keys by their exact scores: the upper bound of every method that searches for keys per query.

Source: Liu et al. 2024, RetrievalAttention, whose index approximates this search.
With one list for all heads it is the upper bound of an indexer of DeepSeek sparse attention, whose lists are shared and
which learns the mean of the heads' attention.
T tokens of a document, Q queries of a piece, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.evaluation.sparse.contract import BudgetMethod, KeyReader, register_sparse_method


@dataclass(frozen=True, kw_only=True)
class ExactTopK(BudgetMethod):
    """The keys of highest score, per query head, or those of most attention over all heads.

    Args:
        budget: keys in all.
        first: first tokens of the document that are always among them.
        local: newest tokens that are always among them.
        shared: one list for all query heads, by the mean of their attention.
    """

    first: int = 0
    local: int = 1
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "first", "local")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return _Best(self)


class _Best(KeyReader):
    def __init__(self, method: ExactTopK):
        self.method = method

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        s_T = torch.arange(scores_HQT.shape[2], device=scores_HQT.device)
        forced_QT = (s_T < self.method.first) | (s_T > s_T[rows, None] - self.method.local)
        seen_HQT = scores_HQT > -torch.inf
        worth_HQT = scores_HQT
        if self.method.shared:
            worth_HQT = scores_HQT.softmax(-1).mean(0, keepdim=True).masked_fill(~seen_HQT[:1], -torch.inf)
        ranked = worth_HQT.masked_fill(forced_QT & seen_HQT[: len(worth_HQT)], torch.inf)
        return best_keys(ranked, self.method.budget).expand_as(scores_HQT)


def best_keys(scores_XT: Tensor, count: int) -> Tensor:
    """Mask of the `count` best along the last dim, the earlier of equal ones; entries of -inf are none.

    >>> best_keys(torch.tensor([1.0, 3.0, 3.0, -torch.inf]), 2)
    tensor([False,  True,  True, False])
    """
    order = torch.sort(scores_XT, dim=-1, descending=True, stable=True).indices[..., :count]
    mask = torch.zeros_like(scores_XT, dtype=torch.bool).scatter_(-1, order, True)
    return mask & (scores_XT > -torch.inf)


register_sparse_method("exact", ExactTopK)
