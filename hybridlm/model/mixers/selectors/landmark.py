"""Blocks weighed inside the softmax by an estimate of the attention they would get (HiLS).

    l_t = rope(norm(W_q x_t + W_u W_d x_t)) per query head
    p_s = softmax over the block of (m . k_s / sqrt(K)),   k'_j = sum_s p_s k_s,   e_j = -sum_s p_s log p_s
    z_tj = l_t . k'_j / sqrt(K) + e_j                    the first order of log sum_s exp(q_t . k_s / sqrt(K)) around m
    o_t = sum_j w_tj Attn(q_t; block j) + w_t Attn(q_t; newest blocks),   w_t = softmax([z_tj, log sum of the newest])

m is a learned vector per query head, rotated to the last token of the block. The blocks of a key/value head are those
of largest w_tj among all blocks, the largest over its query heads. w is the bias z_tj - log sum_s exp(q_t . k_s /
sqrt(K)) of the scores of block j: the selector learns from the model's loss.

Source: HiLS (arXiv 2607.02980) and its code, in the form with a shared vector and without inserted landmark tokens.
B rows, T tokens, D hidden size, H query heads, G key/value heads, R = H/G, K head dim, E blocks, L tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.block_bias import (
    bias_in_pieces,
    is_complete,
    is_local,
    listed_log_sums,
    listed_values,
    local_log_sums,
)
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
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.rope import rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class LandmarkSelectorConfig(SelectorConfig):
    """Configuration of the selection by estimated attention.

    Args:
        rank: of the projection that the queries of the selector add to those of attention.
    """

    kind: str = "landmark"
    rank: int = 64
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.rank > 0, "rank", "must be positive", got=self.rank)

    def lists(self, heads: BlockHeads) -> int:
        return heads.num_kv_heads

    def num_params(self, context: LayerContext, heads: BlockHeads) -> int:
        width = heads.num_heads * heads.head_dim
        return self.rank * (context.hidden_size + width) + width + heads.head_dim

    def flops_per_token(self, context: LayerContext, heads: BlockHeads, context_length: int) -> dict[str, float]:
        width = heads.num_heads * heads.head_dim
        seen = count_seen_entries(context_length, heads.block, heads.block)
        listed = min(seen, heads.topk - heads.local) * heads.block
        near = min(context_length / 2, heads.local * heads.block)
        return {"projections": 2.0 * self.rank * (context.hidden_size + width), "pooling": 4.0 * width,
                "scores": 2.0 * width * (seen + listed), "choice": 2.0 * width * (seen + near)}

    def state_numbers(self, heads: BlockHeads, context_length: int) -> int:
        entries, open_tokens = count_entries(context_length, heads.block, heads.block)
        return entries * heads.num_heads * (heads.head_dim + 1) + open_tokens * heads.num_kv_heads * heads.head_dim

    def feature_numbers(self, heads: BlockHeads) -> tuple[int, bool]:
        return heads.num_kv_heads * heads.head_dim, True


@register_selector("landmark", LandmarkSelectorConfig)
class LandmarkSelector(Selector):
    """The module. Parameters: down_proj [r, D], up_proj [H K, r], q_norm [K], landmark [H, K]."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("q_norm.weight", "landmark")

    def __init__(self, config: LandmarkSelectorConfig, context: LayerContext, heads: BlockHeads):
        super().__init__(config, context, heads)
        width = heads.num_heads * heads.head_dim
        self.down_proj = nn.Linear(context.hidden_size, config.rank, bias=False)
        self.up_proj = nn.Linear(config.rank, width, bias=False)
        self.q_norm = RMSNorm.of(context.norm, heads.head_dim)
        self.landmark = nn.Parameter(torch.zeros(heads.num_heads, heads.head_dim))
        self.rotary_dim = heads.rope.rotary_dim(heads.head_dim)
        self.scores_per_entry = heads.num_heads

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"landmark": VECTOR}, {"up_proj": self.heads.num_heads})

    def init_weights(self, std: float) -> None:
        """Draw the projections and the landmark from normal(0, std); the norm starts plain."""
        init_projections(self, std)
        nn.init.normal_(self.landmark, std=std)

    def features(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.k_BTGK

    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        """Keys and entropies of the blocks, [B, E, H, K + 1]."""
        groups, dim = features_BEL.shape[3:]
        last = SequenceInfo(place_BE + self.window - 1)
        shape = (*place_BE.shape, *self.landmark.shape)
        m_BEHK = self.landmark.to(wide(features_BEL).dtype).expand(shape)
        m_BEHK = rotate(m_BEHK, self.heads.rope, self.rotary_dim, last)
        with torch.autocast(features_BEL.device.type, enabled=False):
            k_BELGK = wide(features_BEL)
            m_BEGRK = m_BEHK.unflatten(2, (groups, -1)) * dim**-0.5
            log_p = torch.einsum("begrk,belgk->begrl", m_BEGRK, k_BELGK).log_softmax(-1)
            p_BEGRL = log_p.exp()
            key_BEGRK = torch.einsum("begrl,belgk->begrk", p_BEGRL, k_BELGK)
            entropy_BEGR1 = -(p_BEGRL * log_p).sum(-1, keepdim=True)
        return torch.cat([key_BEGRK, entropy_BEGR1], -1).flatten(2, 3)

    def queries(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        """Queries and, until `see_keys`, zeros for the sums over the newest blocks: [B, T, H, K + 1]."""
        shift = self.up_proj(self.down_proj(inputs.x_BTD)).view_as(inputs.projected_q_BTHK)
        l_BTHK = rotate(self.q_norm(inputs.projected_q_BTHK + shift), self.heads.rope, self.rotary_dim, seq)
        l_BTHK = wide(l_BTHK) * self.heads.head_dim**-0.5
        return torch.cat([l_BTHK, torch.zeros_like(l_BTHK[..., :1])], -1)

    def see_keys(self, index: BlockIndex, q_BTHK: Tensor, k_BSGK: Tensor, seq: SequenceInfo) -> BlockIndex:
        near_BTH = local_log_sums(q_BTHK, k_BSGK, index.blocks, self.heads.local, seq)
        l_BTHK = index.queries_BT[..., :-1]
        return replace(index, queries_BT=torch.cat([l_BTHK, near_BTH[..., None].to(l_BTHK.dtype)], -1))

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        """Logarithms of the shares of blocks before the newest ones, [B, Q, G, P]."""
        z_BQHP = _estimates(index.queries_BT[:, rows, :, :-1], wide(index.entries_BE))
        far = index.blocks.visible(rows) & ~is_local(self._numbers(index, rows), index.blocks, self.heads.local,
                                                     rows)[:, :, 0]
        near_BQH = index.queries_BT[:, rows, :, -1]
        total_BQH = torch.logaddexp(z_BQHP.masked_fill(~far[:, :, None], -torch.inf).logsumexp(-1), near_BQH)
        return (z_BQHP - total_BQH[..., None]).unflatten(2, (self.lists, -1)).amax(3)

    def _numbers(self, index: BlockIndex, rows: slice) -> Tensor:
        """The number of every block in the document of each query, [B, Q, 1, P]."""
        block_P = torch.arange(index.blocks.number, device=index.blocks.start_BE.device)
        return block_P - index.blocks.first_BT[:, rows, None, None]

    def bias(self, index: BlockIndex, chosen_BTUN: Tensor, q_BTHK: Tensor, k_BSGK: Tensor) -> Tensor:
        blocks, copies = index.blocks, self.heads.num_heads // self.lists

        def make(rows: slice, l_BQHK: Tensor, q_BQHK: Tensor, entries_BE: Tensor, k: Tensor) -> Tensor:
            chosen_BQGN = chosen_BTUN[:, rows]
            chosen_BQHN = chosen_BQGN.repeat_interleave(copies, 2)
            z_BQHN = listed_values(_estimates(l_BQHK, wide(entries_BE)), chosen_BQHN, blocks, rows)
            exact_BQHN = listed_log_sums(q_BQHK, k, chosen_BQGN, blocks, rows)
            plain = is_local(chosen_BQHN, blocks, self.heads.local, rows) | ~is_complete(chosen_BQHN, blocks, rows)
            return (z_BQHN - exact_BQHN).masked_fill(plain, 0.0)

        gathered = chosen_BTUN.shape[2] * chosen_BTUN.shape[3] * blocks.length * self.heads.head_dim
        return bias_in_pieces(make, (index.queries_BT[..., :-1], q_BTHK), (index.entries_BE, k_BSGK),
                              gathered + self.heads.num_heads * blocks.number)


def _estimates(l_BQHK: Tensor, entries_BPHX: Tensor) -> Tensor:
    """z of all blocks, [B, Q, H, P]."""
    key_BPHK, entropy_BPH = entries_BPHX[..., :-1], entries_BPHX[..., -1]
    return torch.einsum("bqhk,bphk->bqhp", l_BQHK, key_BPHK) + entropy_BPH.transpose(1, 2)[:, None]
