"""Blocks to which a sparse softmax gives mass, as many as there are, with that mass as a bias (DashAttention).

    k'_j = sum over the block of softmax_s(m . k_s / sqrt(K)) k_s,     m a learned vector, the mean of its rotations
    p_t = entmax over visible blocks of (q_t . k'_j / sqrt(K)) per query head, many of them zero
    blocks of a key/value head: those whose mean of p over its query heads is positive, the largest of them
    bias_tj = (log(p_tj / L) - mean of this over blocks with mass) / sigma, with log = 0 for blocks without mass

entmax with alpha 1.5 (Peters et al. 2019): p_j = max(s_j / 2 - tau, 0)^2, tau such that the sum is 1. The selector
learns from the model's loss through the bias, which sigma makes as small as asked; gradients keep their direction.

Source: DashAttention (arXiv 2605.18753), as the code of HiLS has it.
B rows, T tokens, Q queries, H query heads, G key/value heads, K head dim, E/P blocks, L tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.block_bias import bias_in_pieces, listed_values
from hybridlm.model.mixers.common.block_selection import (
    BlockHeads,
    BlockIndex,
    Selector,
    SelectorConfig,
    SelectorInputs,
    group_queries,
    register_selector,
)
from hybridlm.model.mixers.common.entries import count_entries, count_seen_entries
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.rope import rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class EntmaxSelectorConfig(SelectorConfig):
    """Configuration of the selection by entmax.

    Args:
        sigma: divides the bias.
    """

    kind: str = "entmax"
    sigma: float = 1e6
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.sigma > 0, "sigma", "must be positive", got=self.sigma)

    def lists(self, heads: BlockHeads) -> int:
        return heads.num_kv_heads

    def num_params(self, context: LayerContext, heads: BlockHeads) -> int:
        return heads.num_kv_heads * heads.head_dim

    def flops_per_token(self, context: LayerContext, heads: BlockHeads, context_length: int) -> dict[str, float]:
        scores = 2.0 * heads.num_heads * heads.head_dim * count_seen_entries(context_length, heads.block, heads.block)
        return {"pooling": 4.0 * heads.num_kv_heads * heads.head_dim, "scores": scores, "choice": scores}

    def state_numbers(self, heads: BlockHeads, context_length: int) -> int:
        return sum(count_entries(context_length, heads.block, heads.block)) * heads.num_kv_heads * heads.head_dim

    def feature_numbers(self, heads: BlockHeads) -> tuple[int, bool]:
        return heads.num_kv_heads * heads.head_dim, True


@register_selector("entmax", EntmaxSelectorConfig)
class EntmaxSelector(Selector):
    """The module. Parameter: landmark [G, K], which starts at zero, so that entries start as mean keys."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("landmark",)

    def __init__(self, config: EntmaxSelectorConfig, context: LayerContext, heads: BlockHeads):
        super().__init__(config, context, heads)
        self.sigma = config.sigma
        self.landmark = nn.Parameter(torch.zeros(heads.num_kv_heads, heads.head_dim))
        self.rotary_dim = heads.rope.rotary_dim(heads.head_dim)
        self.scores_per_entry = heads.num_heads

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"landmark": VECTOR})

    def init_weights(self, std: float) -> None:
        """Set the learned vector to zero."""
        nn.init.zeros_(self.landmark)

    def features(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.k_BTGK

    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        k_BELGK = wide(features_BEL)
        place_BX = (place_BE[..., None] + torch.arange(self.window, device=place_BE.device)).flatten(1)
        m_BXGK = self.landmark.to(k_BELGK.dtype).expand(*place_BX.shape, *self.landmark.shape)
        m_BXGK = rotate(m_BXGK, self.heads.rope, self.rotary_dim, SequenceInfo(place_BX))
        m_BEGK = m_BXGK.unflatten(1, (-1, self.window)).mean(2) * self.heads.head_dim**-0.5
        with torch.autocast(k_BELGK.device.type, enabled=False):
            p_BELG = torch.einsum("begk,belgk->belg", m_BEGK, k_BELGK).softmax(2)
            return torch.einsum("belg,belgk->begk", p_BELG, k_BELGK)

    def queries(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return wide(inputs.q_BTHK) * self.heads.head_dim**-0.5

    def _masses(self, index: BlockIndex, q_BQHK: Tensor, entries_BEGK: Tensor, rows: slice) -> Tensor:
        """p of all blocks, [B, Q, H, P]."""
        q_BQGRK = group_queries(q_BQHK, self.lists)
        score_BQHP = torch.einsum("bqgrk,bpgk->bqgrp", q_BQGRK, wide(entries_BEGK)).flatten(2, 3)
        return entmax(score_BQHP, index.blocks.visible(rows)[:, :, None])

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        p_BQHP = self._masses(index, index.queries_BT[:, rows], index.entries_BE, rows)
        mean_BQGP = p_BQHP.unflatten(2, (self.lists, -1)).mean(3)
        return mean_BQGP.masked_fill(mean_BQGP <= 0, -torch.inf)

    def bias(self, index: BlockIndex, chosen_BTUN: Tensor, q_BTHK: Tensor, k_BSGK: Tensor) -> Tensor:
        copies = self.heads.num_heads // self.lists

        def make(rows: slice, q_BQHK: Tensor, entries_BE: Tensor) -> Tensor:
            p_BQHP = self._masses(index, q_BQHK, entries_BE, rows)
            positive = p_BQHP > 0
            log_BQHP = torch.where(positive, (torch.where(positive, p_BQHP, 1.0) / self.heads.block).log(), 0.0)
            mean_BQH1 = log_BQHP.sum(-1, keepdim=True) / positive.sum(-1, keepdim=True).clamp(min=1)
            chosen_BQHN = chosen_BTUN[:, rows].repeat_interleave(copies, 2)
            return (listed_values(log_BQHP, chosen_BQHN, index.blocks, rows) - mean_BQH1) / self.sigma

        per_query = self.heads.num_heads * index.blocks.number
        return bias_in_pieces(make, (index.queries_BT,), (index.entries_BE,), per_query)


def entmax(score: Tensor, mask: Tensor) -> Tensor:
    """Apply entmax with alpha 1.5 over the last dim, among the entries of `mask`; zeros where there are none.

    >>> entmax(torch.tensor([0.0, 0.0, -9.0]), torch.tensor(True))
    tensor([0.5000, 0.5000, 0.0000])
    """
    half = score.masked_fill(~mask, -torch.inf) / 2
    half = half - half.amax(-1, keepdim=True).clamp(min=torch.finfo(half.dtype).min).detach()
    with torch.no_grad():
        largest = half.sort(-1, descending=True).values
        largest = largest.masked_fill(largest == -torch.inf, 0.0)
        present = mask.expand(half.shape).sum(-1, keepdim=True)
        count = torch.arange(1, half.shape[-1] + 1, device=half.device)
        tau = _threshold(largest.cumsum(-1), largest.square().cumsum(-1), count)
        support = ((tau <= largest) & (count <= present)).sum(-1, keepdim=True)
        least = largest.gather(-1, (support - 1).clamp(min=0))
    inside = mask & (half >= least)
    kept = torch.where(inside, half, 0.0)
    tau = _threshold(kept.sum(-1, keepdim=True), kept.square().sum(-1, keepdim=True),
                     inside.sum(-1, keepdim=True).clamp(min=1))
    return torch.where(inside, half - tau, 0.0).clamp(min=0).square()


def _threshold(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """tau for which the sum of (x - tau)^2 over `count` numbers x of this sum and sum of squares is 1."""
    mean = total / count
    return mean - ((1 - squares + count * mean.square()) / count).clamp(min=0).sqrt()
