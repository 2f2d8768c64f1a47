"""Keys of a prompt by clusters.

Keys of a prompt behind its first tokens are clustered by their directions, per key/value head: a key belongs to the
centroid of largest cosine, a centroid is the mean of its keys. A query reads the first tokens, the clusters of largest
product with their centroids until the budget is full, the last one cut, and all tokens behind the prompt.

Source: Liu et al. 2024, ClusterKV (arXiv 2412.03213), section 3, and the code of its accuracy tests, which keep what is
decoded. Centroids start at keys that are evenly spread over the prompt, where the code draws them.
T tokens of a document, Q queries of a piece, H query heads, G key/value heads, R = H/G, K head dim, C clusters, P keys
that are clustered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.evaluation.sparse.contract import BudgetMethod, KeyReader, PromptMethod, register_sparse_method

ROUNDS = 20  # of k-means at most


@dataclass(frozen=True, kw_only=True)
class ClusterKV(PromptMethod, BudgetMethod):
    """Clusters of the keys of a prompt, per query head; the first two layers dense, as published.

    Args:
        budget: keys of the prompt that a query reads, those of `first` included.
        first: first tokens of the document, which are always read.
        tokens: mean number of tokens per cluster.
        dense_layers: first softmax layers that stay dense.
    """

    first: int = 16
    tokens: int = 80
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "first")
        self.require_at_least(1, "tokens")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return _ClusterReader(self, q_THK, k_TGK)


class _ClusterReader(KeyReader):
    def __init__(self, method: ClusterKV, q_THK: Tensor, k_TGK: Tensor):
        self.method, self.q_THK = method, q_THK
        self.prompt = method.prompt_tokens(len(k_TGK))
        k_GPK = k_TGK[method.first : self.prompt].transpose(0, 1)
        self.clusters = k_means(k_GPK, max(1, k_GPK.shape[1] // method.tokens)) if k_GPK.shape[1] else None

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        if rows.start < self.prompt:
            return None
        heads, queries, tokens = scores_HQT.shape
        s_T = torch.arange(tokens, device=scores_HQT.device)
        mask_HQT = ((s_T < self.method.first) | (s_T >= self.prompt)).expand(heads, queries, tokens).clone()
        if self.clusters is None:
            return mask_HQT
        centroid_GCK, cluster_GP = self.clusters
        q_GRQK = self.q_THK[rows].unflatten(1, (len(centroid_GCK), -1)).permute(1, 2, 0, 3)
        score_GRQC = torch.einsum("grqk,gck->grqc", q_GRQK, centroid_GCK)
        # The rank of a key's cluster decides, inside a cluster its place.
        rank_GRQC = score_GRQC.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        index_GRQP = cluster_GP[:, None, None].expand(*rank_GRQC.shape[:3], -1)
        rank_HQP = rank_GRQC.gather(-1, index_GRQP).flatten(0, 1)
        seen_HQT = scores_HQT > -torch.inf
        left_HQ1 = self.method.budget - seen_HQT[..., : self.method.first].sum(-1, keepdim=True)
        unseen_HQP = ~seen_HQT[..., self.method.first : self.prompt]
        order_HQP = rank_HQP.masked_fill(unseen_HQP, rank_HQP.shape[-1]).argsort(dim=-1, stable=True)
        within_HQP = torch.arange(order_HQP.shape[-1], device=order_HQP.device) < left_HQ1
        taken_HQP = torch.zeros_like(within_HQP).scatter_(-1, order_HQP, within_HQP)
        mask_HQT[..., self.method.first : self.prompt] = taken_HQP
        return mask_HQT


def k_means(k_GPK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster keys by their directions until no key changes its cluster, or for 20 rounds.

    Args:
        k_GPK: the keys of each head.
        count: number of clusters C.

    Returns:
        Centroids [G, C, K], which are means of keys, and the cluster of each key [G, P].
    """
    places = torch.arange(count, device=k_GPK.device) * k_GPK.shape[1] // count
    centroid_GCK = k_GPK[:, places].clone()
    unit_GPK = F.normalize(k_GPK, dim=-1)
    cluster_GP: Tensor | None = None
    for _ in range(ROUNDS):
        found_GP = torch.einsum("gpk,gck->gpc", unit_GPK, F.normalize(centroid_GCK, dim=-1)).argmax(-1)
        if cluster_GP is not None and torch.equal(found_GP, cluster_GP):
            break
        cluster_GP = found_GP
        one_GPC = F.one_hot(cluster_GP, count).to(k_GPK.dtype)
        sizes_GC1 = one_GPC.sum(1)[..., None]
        means_GCK = torch.einsum("gpc,gpk->gck", one_GPC, k_GPK) / sizes_GC1.clamp(min=1)
        centroid_GCK = torch.where(sizes_GC1 > 0, means_GCK, centroid_GCK)
    assert cluster_GP is not None
    return centroid_GCK, cluster_GP


register_sparse_method("clusterkv", ClusterKV)
