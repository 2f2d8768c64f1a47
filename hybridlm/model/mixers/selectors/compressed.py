"""Blocks by a softmax over overlapping mean keys.

    p_ti = softmax over visible windows i of (q_t . mean over the window of k_s / sqrt(K)), summed over a group's heads
    s_tj = sum or maximum of p_ti over the windows that overlap block j

Sources: InfLLM-v2 (Zhao et al. 2025, section 3.2: maximum, and the normaliser from a coarser softmax); Yuan et al.
2025, NSA, section 3.3.2 (sum by overlap; there keys of the windows are learned, see the kind `nsa`).
B rows, Q queries, H query heads, G key/value heads, R = H/G, K head dim, E windows, P blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext
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
from hybridlm.model.mixers.common.overlap import Reduce, reduce_to_blocks, window_softmax
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide

COARSE = 4  # windows of the coarse normaliser are so many times as long, and as far apart


@dataclass(kw_only=True)
class CompressedSelectorConfig(SelectorConfig):
    """Configuration of the selection by overlapping mean keys.

    Args:
        length: tokens of a window, a multiple of `stride`; null takes twice the stride.
        stride: tokens from one window to the next, a divisor of the block; null takes a quarter of the block.
        reduce: `max` or `sum` over the windows that overlap a block.
        normaliser: `exact`, or `coarse`: the softmax divides by the sum over windows four times as long, where a query
            sees one.
    """

    kind: str = "compressed"
    length: int | None = None
    stride: int | None = None
    reduce: Reduce = "max"
    normaliser: Literal["exact", "coarse"] = "exact"

    def __post_init__(self) -> None:
        for key in ("length", "stride"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)

    def check(self, heads: BlockHeads) -> None:
        stride = self.stride_of(heads)
        require(heads.block % stride == 0, "selector.stride", "must divide the block", got=stride,
                expected=f"a divisor of {heads.block}")
        require(self.length_of(heads) % stride == 0, "selector.length", "must be a multiple of the stride",
                got=self.length, expected=f"a multiple of {stride}")

    def stride_of(self, heads: BlockHeads) -> int:
        """Tokens from one window to the next."""
        return max(1, heads.block // 4) if self.stride is None else self.stride

    def length_of(self, heads: BlockHeads) -> int:
        """Tokens of a window."""
        return 2 * self.stride_of(heads) if self.length is None else self.length

    def lists(self, heads: BlockHeads) -> int:
        return heads.num_kv_heads

    def flops_per_token(self, context: LayerContext, heads: BlockHeads, context_length: int) -> dict[str, float]:
        length, stride = self.length_of(heads), self.stride_of(heads)
        seen = count_seen_entries(context_length, length, stride)
        if self.normaliser == "coarse":
            seen += count_seen_entries(context_length, COARSE * length, COARSE * stride)
        return {"scores": 2.0 * heads.num_heads * heads.head_dim * seen}

    def state_numbers(self, heads: BlockHeads, context_length: int) -> int:
        kept = sum(count_entries(context_length, self.length_of(heads), self.stride_of(heads)))
        return kept * heads.num_kv_heads * heads.head_dim


@register_selector("compressed", CompressedSelectorConfig)
class CompressedSelector(Selector):
    """The module; it has no parameters."""

    def __init__(self, config: CompressedSelectorConfig, context: LayerContext, heads: BlockHeads):
        super().__init__(config, context, heads)
        self.config = config
        self.window, self.stride = config.length_of(heads), config.stride_of(heads)
        self.scores_per_entry = heads.num_heads

    def features(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.k_BTGK

    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        return wide(features_BEL).mean(2).to(features_BEL.dtype)

    def queries(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.q_BTHK * self.heads.head_dim**-0.5

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        q_BQGRK = group_queries(index.queries_BT[:, rows], self.heads.num_kv_heads)
        score_BQGRE = torch.einsum("bqgrk,begk->bqgre", q_BQGRK, wide(index.entries_BE))
        p_BQGRE = window_softmax(score_BQGRE, index.windows, rows)
        if self.config.normaliser == "coarse":
            p_BQGRE = self._coarse(p_BQGRE, score_BQGRE, q_BQGRK, index, rows)
        return reduce_to_blocks(p_BQGRE.sum(3), index.windows, index.blocks, rows, self.config.reduce)

    def _coarse(self, p_BQGRE: Tensor, score_BQGRE: Tensor, q_BQGRK: Tensor, index: BlockIndex, rows: slice) -> Tensor:
        """The weights with the sum over coarse windows as their denominator, where a query sees one of these."""
        k_BCGK, seen_BQC = self._coarse_keys(index, rows)
        coarse = torch.einsum("bqgrk,bcgk->bqgrc", q_BQGRK, k_BCGK)
        coarse = coarse.masked_fill(~seen_BQC[:, :, None, None], -torch.inf)
        total = coarse.logsumexp(-1, keepdim=True)
        weights = (score_BQGRE - total).exp().masked_fill(~index.windows.visible(rows)[:, :, None, None], 0.0)
        return torch.where(total == -torch.inf, p_BQGRE, weights)

    def _coarse_keys(self, index: BlockIndex, rows: slice) -> tuple[Tensor, Tensor]:
        """Means over COARSE windows that follow one another without overlap, and which of them each query sees."""
        windows, parts = index.windows, self.window // self.stride
        step_M = torch.arange(COARSE, device=windows.start_BE.device) * parts
        number_BE = windows.place_BE // windows.stride
        entry_BEM = (torch.arange(windows.number, device=step_M.device)[:, None] + step_M).clamp(max=windows.number - 1)
        k_BEGK = wide(index.entries_BE)[:, entry_BEM].mean(2)
        last_E = torch.arange(windows.number, device=step_M.device) + int(step_M[-1])
        end_BQ1 = (windows.first_BT + windows.count_BT)[:, rows, None]
        seen_BQE = windows.visible(rows) & (last_E < end_BQ1) & (number_BE % COARSE == 0)[:, None]
        return k_BEGK, seen_BQE
