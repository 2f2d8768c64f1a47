"""Keys by pages: runs of tokens that are read together.

Sources: Tang et al. 2024, Quest, section 3.3 (bounds); Lu et al. 2025, MoBA, section 2.2 (mean keys, without training).
T tokens of a document, Q queries of a piece, H query heads, G key/value heads, R = H/G, K head dim, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.evaluation.sparse.block_map import per_query_head
from hybridlm.evaluation.sparse.contract import BudgetMethod, KeyReader, register_sparse_method
from hybridlm.evaluation.sparse.search import best_keys

MIN_PAGES = 3  # of Quest


@dataclass(frozen=True, kw_only=True)
class Pages(BudgetMethod):
    """The pages of best score, per query head. The page of the query itself is scored by the tokens up to it.

    Args:
        budget: keys in all; as many pages as it holds, at least 3.
        page: tokens per page.
        score: `bound` of the products with a page's keys, or the product with their `mean`.
    """

    page: int = 16
    score: Literal["bound", "mean"] = "bound"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "page")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return _PageReader(self, *per_query_head(q_THK, k_TGK))


@dataclass(frozen=True, kw_only=True)
class Quest(Pages):
    """Pages by bounds, the first two layers dense, as published.

    Args:
        dense_layers: first softmax layers that stay dense.
    """

    dense_layers: int = 2


class _PageReader(KeyReader):
    def __init__(self, method: Pages, q_HTK: Tensor, k_HTK: Tensor):
        self.method, self.q_HTK = method, q_HTK
        tokens, size = k_HTK.shape[1], method.page
        # A page in which a query stands has a past that grows token by token: running extremes and sums inside pages.
        padded = F.pad(k_HTK, (0, 0, 0, -tokens % size)).unflatten(1, (-1, size))
        if method.score == "bound":
            self.running = [padded.cummax(2).values.flatten(1, 2)[:, :tokens],
                            padded.cummin(2).values.flatten(1, 2)[:, :tokens]]
        else:
            steps = torch.arange(1, size + 1, device=padded.device, dtype=padded.dtype)
            self.running = [(padded.cumsum(2) / steps[:, None]).flatten(1, 2)[:, :tokens]]

    def _score(self, q_HQK: Tensor, summaries: list[Tensor]) -> Tensor:
        """Scores of summaries [H, 1 or Q, P, K] (or of all queries alike [H, P, K]) for queries: [H, Q, P]."""
        if self.method.score == "mean":
            return torch.einsum("hqk,hpk->hqp", q_HQK, summaries[0])
        most, least = summaries
        return torch.einsum("hqk,hpk->hqp", q_HQK.clamp(min=0), most) + torch.einsum(
            "hqk,hpk->hqp", q_HQK.clamp(max=0), least)

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        size, tokens = self.method.page, scores_HQT.shape[2]
        t_Q = torch.arange(tokens, device=scores_HQT.device)[rows]
        q_HQK = self.q_HTK[:, rows]
        complete = [x[:, size - 1 :: size] for x in self.running]
        pages = -(-tokens // size)
        score_HQP = F.pad(self._score(q_HQK, complete), (0, pages - complete[0].shape[1]), value=-torch.inf)
        page_P = torch.arange(pages, device=t_Q.device)
        own_Q1 = (t_Q // size)[:, None]
        if self.method.score == "mean":
            own_HQ = (q_HQK * self.running[0][:, rows]).sum(-1)
        else:
            most, least = (x[:, rows] for x in self.running)
            own_HQ = torch.maximum(q_HQK * most, q_HQK * least).sum(-1)
        score_HQP = torch.where(page_P == own_Q1, own_HQ[..., None], score_HQP)
        seen_QT = (scores_HQT > -torch.inf).any(0)
        seen_QP = F.pad(seen_QT, (0, pages * size - tokens)).unflatten(1, (pages, size)).any(-1)
        score_HQP = score_HQP.masked_fill(~seen_QP, -torch.inf)
        count = max(MIN_PAGES, self.method.budget // size)
        return best_keys(score_HQP, count).repeat_interleave(size, -1)[..., :tokens]


register_sparse_method("pages", Pages)
register_sparse_method("quest", Quest)
