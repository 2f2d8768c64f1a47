"""Maps of blocks: what methods for prompts read, tiles of queries and keys that are computed or not.

T tokens of a document, Q queries of a piece, H query heads, G key/value heads, K head dim, I and J blocks of queries
and of keys, X any dims.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.evaluation.sparse.contract import KeyReader, visible_keys


class BlockMapReader(KeyReader):
    """Reads the blocks of keys that a map names for the block in which a query stands.

    Args:
        map_HIJ: which blocks of keys the queries of a block read, per query head.
        query_block: tokens of a block of queries.
        key_block: tokens of a block of keys.
    """

    def __init__(self, map_HIJ: Tensor, query_block: int, key_block: int):
        self.map_HIJ = map_HIJ
        self.query_block, self.key_block = query_block, key_block

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        tokens = scores_HQT.shape[2]
        block_Q = torch.arange(tokens, device=scores_HQT.device)[rows] // self.query_block
        return self.map_HIJ[:, block_Q].repeat_interleave(self.key_block, 2)[..., :tokens]


def per_query_head(q_THK: Tensor, k_TGK: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with the heads first, keys repeated for the heads that share them: [H, T, K] both."""
    return q_THK.transpose(0, 1), repeat_heads(k_TGK, q_THK.shape[1])


def repeat_heads(x_TGX: Tensor, heads: int) -> Tensor:
    """Keys or values of each query head, repeated for the heads that share them: [H, T, X]."""
    return x_TGX.repeat_interleave(heads // x_TGX.shape[1], 1).transpose(0, 1)


def block_means(x_HTK: Tensor, size: int) -> Tensor:
    """Means over blocks of `size` tokens, the last of which may be shorter: [H, I, K]."""
    tokens = x_HTK.shape[1]
    sums_HIK = F.pad(x_HTK, (0, 0, 0, -tokens % size)).unflatten(1, (-1, size)).sum(2)
    count_I = torch.full((sums_HIK.shape[1],), float(size), dtype=x_HTK.dtype, device=x_HTK.device)
    count_I[-1] = tokens - size * (len(count_I) - 1)
    return sums_HIK / count_I[:, None]


def block_sums(x_XT: Tensor, size: int) -> Tensor:
    """Sums over blocks of `size` entries of the last dim, the last of which may be shorter."""
    return F.pad(x_XT, (0, -x_XT.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def visible_blocks(tokens: int, query_block: int, key_block: int, window: int | None, device: torch.device) -> Tensor:
    """Mask [I, J] of the blocks of keys of which some query of a block sees some key.

    >>> visible_blocks(6, 2, 2, 2, torch.device("cpu")).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """
    first_I1 = torch.arange(0, tokens, query_block, device=device)[:, None]  # the first query of each block
    first_J = torch.arange(0, tokens, key_block, device=device)
    seen_IJ = first_J < first_I1 + query_block
    return seen_IJ if window is None else seen_IJ & (first_J + key_block > first_I1 - window + 1)


def smallest_cover(mass_XJ: Tensor, needed_X: Tensor, forced_XJ: Tensor) -> Tensor:
    """Mask of the forced entries, and of the largest others until the mass of all is at least what is needed.

    >>> mass = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    >>> smallest_cover(mass, torch.tensor([5.0]), torch.tensor([[True, False, False, False]]))
    tensor([[ True,  True, False, False]])
    """
    others_XJ = mass_XJ.masked_fill(forced_XJ, -torch.inf)
    sorted_XJ, order_XJ = others_XJ.sort(dim=-1, descending=True, stable=True)
    sorted_XJ = sorted_XJ.masked_fill(sorted_XJ == -torch.inf, 0.0)
    before_XJ = (mass_XJ * forced_XJ).sum(-1, keepdim=True) + sorted_XJ.cumsum(-1) - sorted_XJ
    taken_XJ = torch.zeros_like(forced_XJ).scatter_(-1, order_XJ, before_XJ < needed_X[..., None])
    return taken_XJ | forced_XJ


def last_queries(q_HTK: Tensor, k_HTK: Tensor, count: int, scale: float, window: int | None) -> Tensor:
    """Attention of the last queries of a document to all keys that they see: [H, Q, T]."""
    score_HQT = torch.einsum("hqk,htk->hqt", q_HTK[:, -count:], k_HTK) * scale
    seen_QT = visible_keys(slice(-count, None), q_HTK.shape[1], window, q_HTK.device)
    return score_HQT.masked_fill(~seen_QT, -torch.inf).softmax(-1)


def diagonal_sums(p_HQT: Tensor) -> Tensor:
    """Sums of attention by distance from query to key, [H, T]; the queries are the last of the document.

    >>> diagonal_sums(torch.tensor([[[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]]))
    tensor([[7., 5., 3.]])
    """
    heads, queries, tokens = p_HQT.shape
    t_Q = torch.arange(tokens, device=p_HQT.device)[tokens - queries :]
    distance_QT = (t_Q[:, None] - torch.arange(tokens, device=p_HQT.device)).clamp(min=0)
    sums_HT = torch.zeros(heads, tokens, dtype=p_HQT.dtype, device=p_HQT.device)
    return sums_HT.scatter_add_(1, distance_QT.flatten().expand(heads, -1), p_HQT.flatten(1))
