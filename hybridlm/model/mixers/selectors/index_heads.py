"""Blocks by index heads: queries of their own, and one index key per token or per block.

    u_t = rope(norm(W_q x_t)) per index head,  s_t,s = sum over a list's heads of f(u_t . v_s) / sqrt(d), f = relu or x
    reduce = max:  v_s = rope(norm(W_k x_s)),                 s_tj = max of s_t,s over the tokens of block j
    reduce = mean: v_j = rope_at_first_token(norm(mean of W_k x_s)),   s_tj = s_t,j

Sources: MSA (MiniMax-M3, arXiv 2606.13392, section 2: one head per key/value head, no relu, maximum); QSA
(Qwen3.8-Flash-Next, arXiv 2608.30320: heads summed by relu to one list, mean over blocks of few tokens).
B rows, Q queries, T tokens, D hidden size, J index heads, d their dims, U lists, L tokens of a block, P blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.block_selection import (
    BlockHeads,
    BlockIndex,
    Selector,
    SelectorConfig,
    SelectorInputs,
    register_selector,
)
from hybridlm.model.mixers.common.entries import count_entries, count_seen_entries
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.norm import RMSNorm
from hybridlm.model.rope import rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class IndexHeadsSelectorConfig(SelectorConfig):
    """Configuration of the selection by index heads.

    Args:
        num_heads: index heads J; null has one per key/value head.
        head_dim: dims per index head d; null takes the head dim of attention. As many of them rotate as in a head of
            attention, or all where there are fewer.
        lists_for: `group` has one list per key/value head, from the same number of index heads each; `all` one for all.
        reduce: `max` over the tokens of a block, or one key per block from the `mean` of its tokens.
        relu: products below zero count as zero.
        loss_weight: of KL(pooled attention || softmax of the scores), the loss that trains it; 0 leaves it untrained.
    """

    kind: str = "index_heads"
    num_heads: int | None = None
    head_dim: int | None = None
    lists_for: Literal["group", "all"] = "group"
    reduce: Literal["max", "mean"] = "max"
    relu: bool = False
    loss_weight: float = 1.0
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        require(self.loss_weight >= 0, "loss_weight", "must not be negative", got=self.loss_weight)

    def index_heads(self, heads: BlockHeads) -> int:
        """Index heads J."""
        return heads.num_kv_heads if self.num_heads is None else self.num_heads

    def index_dim(self, heads: BlockHeads) -> int:
        """Dims per index head d."""
        return heads.head_dim if self.head_dim is None else self.head_dim

    def rotary_dim(self, heads: BlockHeads) -> int:
        """Rotated dims of an index head: as many as the layer rotates of its own heads, at most all of them."""
        return min(heads.rope.rotary_dim(heads.head_dim), self.index_dim(heads))

    def check(self, heads: BlockHeads) -> None:
        require(self.rotary_dim(heads) % 2 == 0, "selector.head_dim", "is an odd number of dims, which all rotate",
                got=self.index_dim(heads), expected="an even number")
        lists = self.lists(heads)
        require(self.index_heads(heads) % lists == 0, "selector.num_heads", "must be a multiple of the lists",
                got=self.num_heads, expected=f"a multiple of {lists}")

    def lists(self, heads: BlockHeads) -> int:
        return 1 if self.lists_for == "all" else heads.num_kv_heads

    def num_params(self, context: LayerContext, heads: BlockHeads) -> int:
        return (context.hidden_size * (self.index_heads(heads) + 1) + 2) * self.index_dim(heads)

    def flops_per_token(self, context: LayerContext, heads: BlockHeads, context_length: int) -> dict[str, float]:
        J, d = self.index_heads(heads), self.index_dim(heads)
        seen = count_seen_entries(context_length, heads.block, heads.block)
        keys = seen * (heads.block if self.reduce == "max" else 1)
        return {"projections": 2.0 * context.hidden_size * (J + 1) * d, "scores": 2.0 * J * d * keys}

    def feature_numbers(self, heads: BlockHeads) -> tuple[int, bool]:
        return self.index_dim(heads), True

    def state_numbers(self, heads: BlockHeads, context_length: int) -> int:
        entries, open_tokens = count_entries(context_length, heads.block, heads.block)
        return self.index_dim(heads) * (entries * (heads.block if self.reduce == "max" else 1) + open_tokens)


@register_selector("index_heads", IndexHeadsSelectorConfig)
class IndexHeadsSelector(Selector):
    """The module. Parameters: q_proj [J d, D], k_proj [d, D], q_norm and k_norm [d]."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("q_norm.weight", "k_norm.weight")

    def __init__(self, config: IndexHeadsSelectorConfig, context: LayerContext, heads: BlockHeads):
        super().__init__(config, context, heads)
        self.config = config
        J, d = config.index_heads(heads), config.index_dim(heads)
        self.q_proj = nn.Linear(context.hidden_size, J * d, bias=False)
        self.k_proj = nn.Linear(context.hidden_size, d, bias=False)
        self.q_norm, self.k_norm = RMSNorm.of(context.norm, d), RMSNorm.of(context.norm, d)
        self.rotary_dim = config.rotary_dim(heads)
        self.scores_per_entry = J * (heads.block if config.reduce == "max" else 1)

    def init_weights(self, std: float) -> None:
        """Draw the projections from normal(0, std); norms start plain."""
        init_projections(self, std)

    def features(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        k_BTd = self.k_proj(inputs.x_BTD)
        return self._key(k_BTd, seq) if self.config.reduce == "max" else k_BTd

    def _key(self, k_BTd: Tensor, seq: SequenceInfo) -> Tensor:
        return rotate(self.k_norm(k_BTd)[:, :, None], self.heads.rope, self.rotary_dim, seq)[:, :, 0]

    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        if self.config.reduce == "max":
            return features_BEL
        return self._key(wide(features_BEL).mean(2).to(features_BEL.dtype), SequenceInfo(place_BE))

    def queries(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        q_BTJd = self.q_norm(self.q_proj(inputs.x_BTD).unflatten(-1, (-1, self.k_norm.weight.shape[0])))
        return rotate(q_BTJd, self.heads.rope, self.rotary_dim, seq) * q_BTJd.shape[-1] ** -0.5

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        q_BQJd, k_BPLd = wide(index.queries_BT[:, rows]), wide(index.entries_BE)
        single = k_BPLd.dim() == 3
        k_BXd = k_BPLd if single else k_BPLd.flatten(1, 2)
        dots_BQJX = torch.einsum("bqjd,bxd->bqjx", q_BQJd, k_BXd)
        dots_BQJX = dots_BQJX.relu() if self.config.relu else dots_BQJX
        summed_BQUX = dots_BQJX.unflatten(2, (self.lists, -1)).sum(3)
        return summed_BQUX if single else summed_BQUX.unflatten(3, k_BPLd.shape[1:3]).amax(-1)
