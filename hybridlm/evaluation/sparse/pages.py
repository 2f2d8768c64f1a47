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


class RunningBounds:
    """Largest products of queries with the keys of each page, as far as a query can know them.

    A page in which a query stands has a past that grows token by token: it has the extremes up to the query.

    Args:
        k_HTK: keys.
        page: tokens per page.
    """

    def __init__(self, k_HTK: Tensor, page: int):
        self.page, self.tokens = page, k_HTK.shape[1]
        padded = _cut_into_pages(k_HTK, page)
        self.most, self.least = (running.values.flatten(1, 2)[:, : self.tokens]
                                 for running in (padded.cummax(2), padded.cummin(2)))

    def scores(self, q_HQK: Tensor, rows: slice) -> Tensor:
        """Bounds [H, Q, P] for the queries `rows`; those of pages that begin behind a query need not be right."""
        most, least = (x[:, self.page - 1 :: self.page] for x in (self.most, self.least))
        whole_HQP = torch.einsum("hqk,hpk->hqp", q_HQK.clamp(min=0), most) + torch.einsum(
            "hqk,hpk->hqp", q_HQK.clamp(max=0), least)
        own_HQ = torch.maximum(q_HQK * self.most[:, rows], q_HQK * self.least[:, rows]).sum(-1)
        return _with_own_page(whole_HQP, own_HQ, rows, self.tokens, self.page)


class RunningMeans:
    """Products of queries with the mean key of each page, of the tokens up to the query where it stands in the page.

    Args:
        k_HTK: keys.
        page: tokens per page.
    """

    def __init__(self, k_HTK: Tensor, page: int):
        self.page, self.tokens = page, k_HTK.shape[1]
        padded = _cut_into_pages(k_HTK, page)
        steps = torch.arange(1, page + 1, device=padded.device, dtype=padded.dtype)
        self.mean = (padded.cumsum(2) / steps[:, None]).flatten(1, 2)[:, : self.tokens]

    def scores(self, q_HQK: Tensor, rows: slice) -> Tensor:
        """Products [H, Q, P] for the queries `rows`; those of pages that begin behind a query need not be right."""
        whole_HQP = torch.einsum("hqk,hpk->hqp", q_HQK, self.mean[:, self.page - 1 :: self.page])
        own_HQ = (q_HQK * self.mean[:, rows]).sum(-1)
        return _with_own_page(whole_HQP, own_HQ, rows, self.tokens, self.page)


def seen_pages(scores_HQT: Tensor, page: int) -> Tensor:
    """Mask [Q, P] of the pages of which a query sees a token, by scores that are -inf elsewhere."""
    seen_QT = (scores_HQT > -torch.inf).any(0)
    return F.pad(seen_QT, (0, -seen_QT.shape[1] % page)).unflatten(1, (-1, page)).any(-1)


def _cut_into_pages(k_HTK: Tensor, page: int) -> Tensor:
    """Keys as [H, P, page, K], the last page filled up with zeros."""
    return F.pad(k_HTK, (0, 0, 0, -k_HTK.shape[1] % page)).unflatten(1, (-1, page))


def _with_own_page(whole_HQP: Tensor, own_HQ: Tensor, rows: slice, tokens: int, page: int) -> Tensor:
    """Scores of all pages [H, Q, P] from those of complete ones and of the page in which each query stands."""
    page_Q1 = (torch.arange(tokens, device=own_HQ.device)[rows] // page)[:, None]
    pages = -(-tokens // page)
    score_HQP = F.pad(whole_HQP, (0, pages - whole_HQP.shape[2]), value=-torch.inf)
    return torch.where(torch.arange(pages, device=own_HQ.device) == page_Q1, own_HQ[..., None], score_HQP)


class _PageReader(KeyReader):
    def __init__(self, method: Pages, q_HTK: Tensor, k_HTK: Tensor):
        self.method, self.q_HTK = method, q_HTK
        self.summaries = (RunningBounds if method.score == "bound" else RunningMeans)(k_HTK, method.page)

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        size, tokens = self.method.page, scores_HQT.shape[2]
        score_HQP = self.summaries.scores(self.q_HTK[:, rows], rows)
        score_HQP = score_HQP.masked_fill(~seen_pages(scores_HQT, size), -torch.inf)
        count = max(MIN_PAGES, self.method.budget // size)
        return best_keys(score_HQP, count).repeat_interleave(size, -1)[..., :tokens]


register_sparse_method("pages", Pages)
register_sparse_method("quest", Quest)
