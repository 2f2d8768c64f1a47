"""Blocks of a prompt by sums of antidiagonals.

    score_ij = sum over k < S of q_(i S + S - 1 - k) . k_(j S + k) / (sqrt(K) S)       tiles of S x S, j <= i
    mass of a block = sum of softmax_j(score_ij) over the tiles in it

Each block of queries reads its own block, the first, and the largest others until a share `threshold` of the mass is
read.

Source: Xu et al. 2025, XAttention (arXiv 2503.16428), section 2; its code keeps the first and the own block.
T tokens of a document, H query heads, K head dim, S stride, X tiles per row, I blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.errors import require
from hybridlm.evaluation.sparse.block_map import BlockMapReader, per_query_head, smallest_cover, visible_blocks
from hybridlm.evaluation.sparse.contract import KeyReader, SparseMethod, register_sparse_method


@dataclass(frozen=True, kw_only=True)
class XAttention(SparseMethod):
    """Blocks by antidiagonals, per query head, with a document as one prompt.

    Args:
        threshold: share of the estimated attention that is read.
        stride: tokens of a tile S, a divisor of `block`.
        block: tokens per block.
    """

    threshold: float = 0.9
    stride: int = 8
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "stride", "block")
        self.require_share("threshold")
        require(self.block % self.stride == 0, "stride", "does not divide the block", got=self.stride,
                expected=f"a divisor of {self.block}")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return BlockMapReader(self.block_map(*per_query_head(q_THK, k_TGK), scale, window), self.block, self.block)

    def block_map(self, q_HTK: Tensor, k_HTK: Tensor, scale: float, window: int | None) -> Tensor:
        """Decide which blocks are read, [H, I, I]."""
        tokens, S = q_HTK.shape[1], self.stride
        q_HXSK, k_HXSK = (F.pad(x, (0, 0, 0, -tokens % self.block)).unflatten(1, (-1, S)) for x in (q_HTK, k_HTK))
        score_HXX = torch.einsum("hisk,hjsk->hij", q_HXSK.flip(2), k_HXSK) * (scale / S)
        empty_X = torch.arange(score_HXX.shape[1], device=q_HTK.device) * S >= tokens
        seen_XX = visible_blocks(q_HXSK.shape[1] * S, S, S, window, q_HTK.device)
        score_HXX = score_HXX.masked_fill(~seen_XX | empty_X, -torch.inf)
        p_HXX = score_HXX.softmax(-1).nan_to_num(0.0).masked_fill(empty_X[:, None], 0.0)  # rows behind the end
        size = self.block // S
        mass_HII = p_HXX.unflatten(2, (-1, size)).sum(-1).unflatten(1, (-1, size)).sum(2)
        block_I = torch.arange(mass_HII.shape[1], device=q_HTK.device)
        forced_II = (block_I == 0) | (block_I == block_I[:, None])
        chosen = smallest_cover(mass_HII, self.threshold * mass_HII.sum(-1), forced_II.expand_as(mass_HII))
        return chosen & (block_I <= block_I[:, None])


register_sparse_method("xattention", XAttention)
