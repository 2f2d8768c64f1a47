"""Keys by approximate scores on a few channels.

    approximate score = sum over the heavy channels c of q_c k_c, both rounded to `bits` bits per token and head

The heavy channels of a head are those with the largest mean of abs(q_c k_c), of tokens with themselves.

Source: Yang et al. 2024, Double Sparsity (arXiv 2408.07092), section 3, and its code for channels and rounding. The
paper finds channels once, on a set of texts; here each document finds them in its first tokens, which are dense.
T tokens of a document, Q queries of a piece, H query heads, K head dim, C heavy channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.evaluation.sparse.block_map import per_query_head
from hybridlm.evaluation.sparse.contract import BudgetMethod, KeyReader, register_sparse_method
from hybridlm.evaluation.sparse.search import best_keys

FULL_BITS = 16  # from here on nothing is rounded


@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(BudgetMethod):
    """The keys of best approximate score, per query head; the first two layers dense, as published.

    Args:
        budget: keys in all.
        share: channels of a head per heavy channel: of K channels, K / `share` are heavy.
        bits: bits per number of the approximate scores' queries and keys; 16 or more rounds nothing.
        calibration: first tokens of a document, which choose its channels.
        dense_layers: first softmax layers that stay dense.
    """

    share: int = 8
    bits: int = 4
    calibration: int = 64
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "share", "bits", "calibration")

    def piece_length(self, length: int) -> int | None:
        return min(length, self.calibration)

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return _HeavyChannels(self, *per_query_head(q_THK, k_TGK))


class _HeavyChannels(KeyReader):
    def __init__(self, method: DoubleSparsity, q_HTK: Tensor, k_HTK: Tensor):
        self.method = method
        first = slice(0, method.calibration)
        weight_HK = (q_HTK[:, first] * k_HTK[:, first]).abs().mean(1)
        channels = max(1, q_HTK.shape[2] // method.share)
        heavy_HC = weight_HK.sort(dim=-1, descending=True, stable=True).indices[:, :channels]
        index_HTC = heavy_HC[:, None].expand(-1, q_HTK.shape[1], -1)
        self.q_HTC, self.k_HTC = (_rounded(x.gather(2, index_HTC), method.bits) for x in (q_HTK, k_HTK))

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        if rows.start < self.method.calibration:
            return None
        score_HQT = torch.einsum("hqc,htc->hqt", self.q_HTC[:, rows], self.k_HTC)
        return best_keys(score_HQT.masked_fill(scores_HQT == -torch.inf, -torch.inf), self.method.budget)


def _rounded(x_HTC: Tensor, bits: int) -> Tensor:
    """Numbers on a grid of 2^bits - 1 steps from the least to the largest channel of each token.

    >>> _rounded(torch.tensor([[[0.0, 0.3, 0.7, 1.0]]]), 1)
    tensor([[[0., 0., 1., 1.]]])
    """
    if bits >= FULL_BITS:
        return x_HTC
    least, most = x_HTC.amin(-1, keepdim=True), x_HTC.amax(-1, keepdim=True)
    step = (most - least) / (2**bits - 1)
    step = torch.where(step == 0, torch.ones_like(step), step)
    return ((x_HTC - least) / step).round() * step + least


register_sparse_method("double_sparsity", DoubleSparsity)
