"""The lightning indexer over compressed entries: picks, for each token, the entries that attention reads.

    I_te = sum_j w_tj relu(q_tj . k_e) * Di^-0.5 * Hi^-0.5,   attention reads the `topk` entries e of highest I_te

k_e are entries of its own, pooled as those of attention but narrower; q_t comes from the latent of the queries.

Source: DeepSeek-V4, 2026, section 2.3.1. Its training is that of DeepSeek-V3.2 (section 2.1), with entries for keys.
B rows, T tokens, Q queries of a piece, E entries, D hidden size, J index heads (Hi), I index head dim (Di), N selected
entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import EntryCache
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.block_selection import BlockBudget, BlockIndex, choose_blocks
from hybridlm.model.mixers.common.cost import count_visible_pools
from hybridlm.model.mixers.common.gated_entries import (
    GatedEntries,
    entry_params,
    entry_projection_weights,
    entry_state_numbers,
)
from hybridlm.model.mixers.module import AttentionMode
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.readable_weights import weight_dtype
from hybridlm.model.rope import RopeConfig, rotate_last
from hybridlm.model.sequence import SequenceInfo
from hybridlm.plain_data import to_dict
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class EntryIndexerConfig:
    """Configuration of an indexer over entries.

    Args:
        num_heads: index heads Hi.
        head_dim: dims per index head Di, at least those that rotate.
        topk: entries that a token reads.
        loss_weight: of KL(attention to entries || softmax(I)), the loss that trains the indexer; 0 leaves it untrained.
        mode: `dense` reads all entries and keeps the parameters, as before a stage of sparse training.
    """

    num_heads: int = 64
    head_dim: int = 128
    topk: int = 512
    loss_weight: float = 1.0
    mode: AttentionMode = "sparse"

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "topk"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        require(self.loss_weight >= 0, "loss_weight", "must not be negative", got=self.loss_weight)

    def canonical(self) -> dict[str, Any]:
        """The options that the selection depends on, as plain data."""
        data = to_dict(self)
        data.pop("loss_weight")  # says only how the indexer is trained
        return data

    def projection_weights(self, hidden_size: int, query_dim: int, overlap: bool) -> int:
        """Number of weights of the projections, those of its entries included."""
        return (query_dim * self.num_heads * self.head_dim + hidden_size * self.num_heads
                + entry_projection_weights(hidden_size, self.head_dim, overlap))

    def num_params(self, hidden_size: int, query_dim: int, ratio: int, overlap: bool) -> int:
        """Number of parameters."""
        own = query_dim * self.num_heads * self.head_dim + hidden_size * self.num_heads
        return own + entry_params(hidden_size, self.head_dim, ratio, overlap)

    def score_flops(self, context_length: int, ratio: int) -> float:
        """FLOPs per token of the scores of the entries that a token sees."""
        return 2.0 * self.num_heads * (self.head_dim + 1) * count_visible_pools(context_length, ratio)

    def state_numbers(self, context_length: int, ratio: int, overlap: bool) -> int:
        """Numbers in the decode state after `context_length` tokens."""
        return 0 if self.mode == "dense" else entry_state_numbers(context_length, self.head_dim, ratio, overlap)


class EntryIndexer(nn.Module):
    """The module: q_proj [J I, Q], weights_proj [J, D] and entries, a `GatedEntries`."""

    lists = 1

    def __init__(self, config: EntryIndexerConfig, context: LayerContext, query_dim: int, ratio: int, overlap: bool,
                 rope: RopeConfig, rotary_dim: int):
        super().__init__()
        self.config, self.rope, self.rotary_dim = config, rope, rotary_dim
        self.topk = config.topk
        self.scores_per_entry = config.num_heads
        self.q_proj = nn.Linear(query_dim, config.num_heads * config.head_dim, bias=False)
        self.weights_proj = nn.Linear(context.hidden_size, config.num_heads, bias=False)
        self.entries = GatedEntries(context, config.head_dim, ratio, overlap, rope, rotary_dim)

    @property
    def budget(self) -> BlockBudget:
        """Number of entries that are read; none is read without being chosen."""
        return BlockBudget(self.topk, first=0, local=0)

    def forward(self, x_BTD: Tensor, latent_BTQ: Tensor, seq: SequenceInfo, cache: EntryCache | None) -> BlockIndex:
        """Index queries [B, T, J, I + 1], the last number being the weight of the head, and entries [B, E, I]."""
        config = self.config
        q_BTJI = self.q_proj(latent_BTQ).unflatten(-1, (config.num_heads, config.head_dim))
        q_BTJI = wide(rotate_last(q_BTJI, self.rope, self.rotary_dim, seq))
        with torch.autocast(x_BTD.device.type, enabled=False):  # the selection is discontinuous: keep it exact
            w_BTJ = self.weights_proj(x_BTD.to(weight_dtype(self.weights_proj)))
        w_BTJ = w_BTJ.to(q_BTJI.dtype) * (config.head_dim * config.num_heads) ** -0.5
        entries_BEI, windows = self.entries(x_BTD, seq, cache)
        return BlockIndex(torch.cat([q_BTJI, w_BTJ[..., None]], -1), entries_BEI, windows, windows)

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        """Scores [B, Q, 1, E] of all entries for the queries `rows`."""
        q_BQJI, w_BQJ1 = index.queries_BT[:, rows].split([self.config.head_dim, 1], -1)
        dots_BQJE = torch.einsum("bqji,bei->bqje", q_BQJI, wide(index.entries_BE)).relu()
        return (w_BQJ1 * dots_BQJE).sum(2, keepdim=True)

    def choose(self, index: BlockIndex) -> Tensor:
        """Numbers of the chosen entries in the query's document, int64 [B, T, 1, N], ascending, -1 for none."""
        return choose_blocks(self, index, self.budget)[..., :-1]  # the last one is the window that is still open

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, head_rows={"q_proj": self.config.num_heads})
