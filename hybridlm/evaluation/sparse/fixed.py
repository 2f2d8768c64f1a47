"""Keys by their place alone: the first tokens and a window.

Source: Xiao et al. 2023, StreamingLLM. Positions stay true: the published cache counts them from its own start.
T tokens of a document, Q queries of a piece, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.evaluation.sparse.contract import BudgetMethod, KeyReader, register_sparse_method


@dataclass(frozen=True, kw_only=True)
class Streaming(BudgetMethod):
    """The first tokens of a document and the newest ones.

    Args:
        budget: keys in all.
        first: those of them that are at the start.
    """

    first: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "first")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return FirstAndNewest(self.first, self.budget - self.first, window)


class FirstAndNewest(KeyReader):
    """Reads the first tokens and the newest ones; in a window, also a newest one for each first one out of sight.

    Args:
        first: number of first tokens.
        newest: number of newest tokens, at least the query's own.
        window: last keys that a query sees; None sees all.
    """

    def __init__(self, first: int, newest: int, window: int | None):
        self.first, self.newest, self.window = first, newest, window

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        s_T = torch.arange(scores_HQT.shape[2], device=scores_HQT.device)
        t_Q1 = s_T[rows, None]
        window = scores_HQT.shape[2] if self.window is None else self.window
        hidden_Q1 = (t_Q1 - window + 1).clamp(min=0, max=self.first)
        newest_Q1 = (self.newest + hidden_Q1).clamp(min=1)
        return ((s_T < self.first) | (s_T > t_Q1 - newest_Q1)).expand_as(scores_HQT)


register_sparse_method("streaming", Streaming)
