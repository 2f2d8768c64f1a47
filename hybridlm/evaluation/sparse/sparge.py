"""Selects blocks of keys by mean queries and mean keys, where the tokens of a block are similar to one another.

    similarity of a block = mean over its pairs of tokens of their cosine
    mass_ij = softmax_j(mean q_i . mean k_j / sqrt(K))      over key blocks j that are similar and not later

Queries of a similar block read the largest key blocks whose masses sum up to at most `cdf`, at least one; blocks of
either kind that are not similar are computed in full.

Source: Zhang et al. 2025, SpargeAttention (arXiv 2502.18137), section 3.3. Not emulated: int8 products, and the second
stage, which leaves out products with values that weigh next to nothing.
T tokens of a document, H query heads, K head dim, I blocks of queries, J blocks of keys, N tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.evaluation.sparse.block_map import BlockMapReader, block_means, per_query_head, visible_blocks
from hybridlm.evaluation.sparse.contract import KeyReader, SparseMethod, register_sparse_method


@dataclass(frozen=True, kw_only=True)
class SpargeAttention(SparseMethod):
    """Blocks by mean queries and keys, per query head, with a document as one prompt.

    Args:
        cdf: share of the estimated attention that is read.
        similarity: blocks whose tokens are less similar are computed in full.
        query_block: tokens per block of queries.
        key_block: tokens per block of keys.
    """

    cdf: float = 0.9
    similarity: float = 0.1
    query_block: int = 128
    key_block: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "query_block", "key_block")
        self.require_share("cdf")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        found = self.block_map(*per_query_head(q_THK, k_TGK), scale, window)
        return BlockMapReader(found, self.query_block, self.key_block)

    def block_map(self, q_HTK: Tensor, k_HTK: Tensor, scale: float, window: int | None) -> Tensor:
        """Decide which blocks are read, [H, I, J]."""
        q_similar_HI, k_similar_HJ = (_similarity(x, size) > self.similarity
                                      for x, size in ((q_HTK, self.query_block), (k_HTK, self.key_block)))
        score_HIJ = torch.einsum("hik,hjk->hij", block_means(q_HTK, self.query_block),
                                 block_means(k_HTK, self.key_block)) * scale
        j = torch.arange(score_HIJ.shape[2], device=q_HTK.device)
        seen_IJ = visible_blocks(q_HTK.shape[1], self.query_block, self.key_block, window, q_HTK.device)
        score_HIJ = score_HIJ.masked_fill(~seen_IJ | ~k_similar_HJ[:, None], -torch.inf)
        p_HIJ = score_HIJ.softmax(-1).nan_to_num(0.0)  # no key block is similar
        sorted_HIJ, order_HIJ = p_HIJ.sort(dim=-1, descending=True, stable=True)
        count_HI1 = (sorted_HIJ.cumsum(-1) <= self.cdf).sum(-1, keepdim=True).clamp(min=1)
        map_HIJ = torch.zeros_like(seen_IJ.expand_as(p_HIJ)).scatter_(-1, order_HIJ, j < count_HI1)
        return (map_HIJ | ~k_similar_HJ[:, None] | ~q_similar_HI[..., None]) & seen_IJ


def _similarity(x_HTK: Tensor, size: int) -> Tensor:
    """Mean cosine of all pairs of tokens of a block, [H, I]: the squared length of the mean of unit vectors."""
    return block_means(F.normalize(x_HTK, dim=-1), size).square().sum(-1)


register_sparse_method("sparge", SpargeAttention)
