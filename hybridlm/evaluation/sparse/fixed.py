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

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float) -> KeyReader:
        return _FirstAndLast(self.first, max(1, self.budget - self.first))


class _FirstAndLast(KeyReader):
    def __init__(self, first: int, window: int):
        self.first, self.window = first, window

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        s_T = torch.arange(scores_HQT.shape[2], device=scores_HQT.device)
        t_Q1 = s_T[rows, None]
        return ((s_T < self.first) | (s_T > t_Q1 - self.window)).expand_as(scores_HQT)


register_sparse_method("streaming", Streaming)
