"""Blocks by a learned gate on queries and pooled keys, both before their rotation.

    g_t = rope(W_q [q_t of the group's heads]),   h_j = rope_at_first_token(W_k [max, min, mean over the block of k_s])
    s_tj = g_t . h_j / sqrt(d)                    one list per key/value head

The gate is distilled from attention: its loss reaches nothing but W_q and W_k.
Source: Gao et al. 2025, SeerAttention-R, section 3.
B rows, Q queries, T tokens, G key/value heads, R query heads per key/value head, K head dim, d dims of the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.rope import rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class GateSelectorConfig(SelectorConfig):
    """Configuration of the gate of SeerAttention-R.

    Args:
        dim: dims of the gate d; null takes the head dim.
        loss_weight: of KL(pooled attention || softmax of the scores), the loss that trains it; 0 leaves it untrained.
    """

    kind: str = "gate"
    dim: int | None = None
    loss_weight: float = 1.0
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.dim is None or self.dim > 0, "dim", "must be positive", got=self.dim)
        require(self.loss_weight >= 0, "loss_weight", "must not be negative", got=self.loss_weight)

    def check(self, heads: BlockHeads) -> None:
        heads.rope.check(self.gate_dim(heads), "selector.dim")

    def gate_dim(self, heads: BlockHeads) -> int:
        """Dims of the gate d."""
        return heads.head_dim if self.dim is None else self.dim

    def lists(self, heads: BlockHeads) -> int:
        return heads.num_kv_heads

    def num_params(self, context: LayerContext, heads: BlockHeads) -> int:
        return (heads.num_heads + 3 * heads.num_kv_heads) * heads.head_dim * self.gate_dim(heads)

    def flops_per_token(self, context: LayerContext, heads: BlockHeads, context_length: int) -> dict[str, float]:
        d = self.gate_dim(heads)
        entries = count_entries(context_length, heads.block, heads.block)[0] / max(1, context_length)
        projections = 2.0 * heads.head_dim * d * (heads.num_heads + 3 * heads.num_kv_heads * entries)
        seen = count_seen_entries(context_length, heads.block, heads.block)
        return {"projections": projections, "scores": 2.0 * heads.num_kv_heads * d * seen}

    def state_numbers(self, heads: BlockHeads, context_length: int) -> int:
        entries, open_tokens = count_entries(context_length, heads.block, heads.block)
        return heads.num_kv_heads * (entries * self.gate_dim(heads) + open_tokens * heads.head_dim)


@register_selector("gate", GateSelectorConfig)
class GateSelector(Selector):
    """The module. Parameters: q_weight [G, R K, d], k_weight [G, 3 K, d]."""

    def __init__(self, config: GateSelectorConfig, context: LayerContext, heads: BlockHeads):
        super().__init__(config, context, heads)
        groups, d = heads.num_kv_heads, config.gate_dim(heads)
        self.q_weight = nn.Parameter(torch.zeros(groups, heads.num_heads // groups * heads.head_dim, d))
        self.k_weight = nn.Parameter(torch.zeros(groups, 3 * heads.head_dim, d))
        self.rotary_dim = heads.rope.rotary_dim(d)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        stack = ParameterRole("expert_stack")
        return find_roles(self, {"q_weight": stack, "k_weight": stack})

    def init_weights(self, std: float) -> None:
        """Draw both weights from normal(0, std)."""
        nn.init.normal_(self.q_weight, std=std)
        nn.init.normal_(self.k_weight, std=std)

    def features(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        return inputs.raw_k_BTGK

    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        x = wide(features_BEL)
        pooled_BEGX = torch.cat([x.amax(2), x.amin(2), x.mean(2)], -1)
        with torch.autocast(x.device.type, enabled=False):
            gate_BEGd = torch.einsum("begx,gxd->begd", pooled_BEGX, self.k_weight.to(pooled_BEGX.dtype))
        return rotate(gate_BEGd, self.heads.rope, self.rotary_dim, SequenceInfo(place_BE))

    def queries(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        q_BTGX = wide(inputs.raw_q_BTHK).unflatten(2, (self.heads.num_kv_heads, -1)).flatten(3)
        with torch.autocast(q_BTGX.device.type, enabled=False):
            gate_BTGd = torch.einsum("btgx,gxd->btgd", q_BTGX, self.q_weight.to(q_BTGX.dtype))
        gate_BTGd = rotate(gate_BTGd, self.heads.rope, self.rotary_dim, seq)
        return gate_BTGd * gate_BTGd.shape[-1] ** -0.5

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        return torch.einsum("bqgd,bpgd->bqgp", wide(index.queries_BT[:, rows]), wide(index.entries_BE))
