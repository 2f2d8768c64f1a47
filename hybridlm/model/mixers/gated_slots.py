"""Slot attention: softmax attention over M slots that each hold a decayed average of keys and of values (GSA, ABC).

    K_t = K_{t-1} Diag(e^{g_t}) + k_t s_t^T;   V_t = Diag(e^{g_t}) V_{t-1} + s_t v_t^T
    o_t = V_t^T softmax(scale * K_t^T q_t)

    GSA    g = logsigmoid(W_s x) / 8,  s = 1 - e^g;  q, k, v = silu(.);  out = W_o norm(silu(o)),  norm over all heads
    ABC    s and g are the softmax of W_s x over the tokens so far;  q, k rotated;  out = W_o (norm(o) * silu(W_g x))

Sources: Zhang et al. 2024 (Gated Slot Attention); Peng et al. 2022 (ABC), in the block of
flash-linear-attention.

Several queries can share one key/value head, whose slots are then kept once.

B rows, T tokens, D hidden size, H query heads, G key/value heads, R = H / G, K key dim, V value dim, M slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.cumulative_softmax import cumulative_softmax, cumulative_softmax_traffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.matrix_state import (
    compute_decay_from_start,
    matrix_traffic,
    read_incoming_state,
    scan_matrix_state,
)
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.norm import GatedRMSNorm, RMSNorm
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import value_decay_attention
from hybridlm_kernels.precision import wide

FP32_BYTES = 4  # bytes per element
PASSES = ("keys", "values")  # of slots: tensors of the decode state
CHUNK_TOKENS = 32  # tokens per chunk of the operations, assumed by the estimate of activations


@dataclass(kw_only=True)
class GatedSlotsConfig(StateHeadsConfig):
    """Configuration of slot attention.

    Args:
        num_heads: query heads H.
        head_dim: dims K of queries and keys.
        num_kv_heads: key/value heads G, each with slots of its own; null is `num_heads`.
        value_head_dim: dims V of values; null is K.
        num_slots: slots M per key/value head.
        rule: gsa or abc, see the equations at the top of the file.
        gate_normalizer: divisor of the logarithm of the decay (gsa).
        max_logit: bound on the logits of the softmax over time, either way (abc).
        rope_theta: base of the rotation of queries and keys (abc); null rotates nothing.
        norm_eps: of the output norm; null takes the model's.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "gated_slots"
    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    value_head_dim: int | None = None
    num_slots: int = 64
    rule: Literal["gsa", "abc"] = "gsa"
    gate_normalizer: float = 8.0
    max_logit: float = 32.0
    rope_theta: float | None = 10000.0
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "num_kv_heads", "value_head_dim", "num_slots", "gate_normalizer",
                    "max_logit", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        require(self.num_heads % self.kv_heads == 0, "num_kv_heads", "must divide num_heads", got=self.num_kv_heads,
                expected=f"a divisor of {self.num_heads}")
        self.rope.check(self.head_dim, "head_dim")

    @property
    def rope(self) -> RopeConfig:
        """The rotation of queries and keys."""
        if self.rule == "gsa" or self.rope_theta is None:
            return RopeConfig(kind="none")
        return RopeConfig(theta=self.rope_theta)

    @property
    def kv_heads(self) -> int:
        """Key/value heads G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def value_dim(self) -> int:
        """Dims V of values."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def slots(self) -> int:
        """Slots G M of all key/value heads."""
        return self.kv_heads * self.num_slots

    def _weights(self, context: LayerContext) -> int:
        H, G = self.num_heads, self.kv_heads
        values = (G + (1 if self.rule == "gsa" else 2) * H) * self.value_dim
        return context.hidden_size * ((H + G) * self.head_dim + values + self.slots)

    def num_params(self, context: LayerContext) -> int:
        return self._weights(context) + self.value_dim * (self.num_heads if self.rule == "gsa" else 1)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Both recurrences are counted as the paper writes them, the softmax as five operations per slot."""
        return {"projections": 2.0 * self._weights(context),
                "recurrence": 3.0 * self.slots * (self.head_dim + self.value_dim)
                + self.num_heads * self.num_slots * (2.0 * (self.head_dim + self.value_dim) + 5.0)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the slots' keys and values in fp32; ABC keeps a sum and a maximum per slot beside them."""
        sums = 2 if self.rule == "abc" else 0
        return FP32_BYTES * self.slots * (self.head_dim + self.value_dim + sums)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: projections, and both chunked operations in fp32."""
        keys, values = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        all_slots = self.num_heads * self.num_slots  # slots are copied for the queries that share them
        per_chunk = all_slots * (self.head_dim + self.value_dim) / CHUNK_TOKENS + 2 * self.num_heads * CHUNK_TOKENS
        slots = (12 if self.rule == "gsa" else 16) * all_slots
        return (element_bytes * (context.hidden_size + 4 * keys + 5 * values)
                + FP32_BYTES * (2 * keys + values + slots + per_chunk))

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: both passes are linear in their state, and the softmax is over slots."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """Bytes of the slots at the end of a shard, of what it keeps of those before, and of ABC's softmax, in fp32."""
        gathered = [matrix_traffic(rows, self.num_heads, dim, self.num_slots, self.num_heads * self.num_slots)
                    for dim in (self.head_dim, self.value_dim)]
        if self.rule == "gsa":
            return gathered
        return [*gathered, *cumulative_softmax_traffic(rows, self.slots)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        data |= {"value_head_dim": self.value_dim, "num_kv_heads": self.kv_heads}
        void = ("max_logit", "rope_theta") if self.rule == "gsa" else ("gate_normalizer",)
        return {key: value for key, value in data.items() if key not in void}

    def state_heads(self) -> int:
        return self.kv_heads

    def with_state_heads(self, count: int) -> Self:
        return replace(self, num_heads=count * (self.num_heads // self.kv_heads),
                       num_kv_heads=None if self.num_kv_heads is None else count)

    def rotates(self) -> bool:
        return self.rope.kind != "none"


@register_mixer("gated_slots", GatedSlotsConfig)
class GatedSlots(TensorStateMixer):
    """Parameters: q_proj [H K, D], k_proj [G K, D], v_proj [G V, D], s_proj [G M, D], o_norm, o_proj [D, H V]; in ABC
    g_proj [H V, D].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("o_norm.weight",)
    config: GatedSlotsConfig

    def __init__(self, config: GatedSlotsConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, G = context.hidden_size, config.num_heads, config.kv_heads
        self.q_proj, self.k_proj = (nn.Linear(D, heads * config.head_dim, bias=False) for heads in (H, G))
        self.v_proj = nn.Linear(D, G * config.value_dim, bias=False)
        self.s_proj = nn.Linear(D, config.slots, bias=False)
        self.o_proj = nn.Linear(H * config.value_dim, D, bias=False)
        eps = context.norm.eps_or(config.norm_eps)
        self.o_norm: RMSNorm | GatedRMSNorm
        if config.rule == "gsa":
            self.o_norm = RMSNorm(H * config.value_dim, eps)
        else:
            self.g_proj = nn.Linear(D, H * config.value_dim, bias=False)
            self.o_norm = GatedRMSNorm(config.value_dim, eps, "silu")

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        heads, groups = (config.num_heads, -1), (config.kv_heads, -1)
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, heads)
        k_BTGK, v_BTGV = (projection(x_BTD).unflatten(-1, groups) for projection in (self.k_proj, self.v_proj))
        logits_BTS = wide(self.s_proj(x_BTD))
        if config.rule == "gsa":
            q_BTHK, k_BTGK, v_BTGV = F.silu(q_BTHK), F.silu(k_BTGK), F.silu(v_BTGV)
            g_BTS = F.logsigmoid(logits_BTS) / config.gate_normalizer
            write_BTS = -torch.expm1(g_BTS)
        else:
            dims = config.rope.rotary_dim(config.head_dim)
            q_BTHK, k_BTGK = (rotate(x, config.rope, dims, seq) for x in (q_BTHK, k_BTGK))
            write_BTS, g_BTS = cumulative_softmax(logits_BTS.clamp(-config.max_logit, config.max_logit), seq, state)
        per_group = config.num_heads // config.kv_heads
        shared = (k_BTGK, v_BTGV, write_BTS.unflatten(-1, groups), g_BTS.unflatten(-1, groups))
        k_BTHK, v_BTHV, write_BTHM, g_BTHM = (x.repeat_interleave(per_group, 2) if per_group > 1 else x for x in shared)
        if state is not None and per_group > 1:  # the queries of a group read copies of one state
            copies = {name: state.tensors[name].repeat_interleave(per_group, 1) for name in PASSES
                      if name in state.tensors}
            state.tensors.update(copies)
        o_BTHV = self._read_slots(q_BTHK, k_BTHK, v_BTHV, write_BTHM, g_BTHM, seq, state)
        if state is not None and per_group > 1:
            state.tensors.update({name: state.tensors[name][:, ::per_group].clone() for name in PASSES})
        if isinstance(self.o_norm, RMSNorm):
            return self.o_proj(self.o_norm(F.silu(o_BTHV).flatten(-2))), {}
        return self.o_proj(self.o_norm(o_BTHV, self.g_proj(x_BTD).unflatten(-1, heads)).flatten(-2)), {}

    def _read_slots(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, write_BTHM: Tensor, g_BTHM: Tensor,
                    seq: SequenceInfo, state: TensorState | None) -> Tensor:
        """The values of the slots [B, T, H, V], weighted by the softmax of the queries' scores with their keys."""
        start = None if state is None else state.tensors.get("keys")
        scale = 1.0 if self.config.rule == "gsa" else self.config.head_dim**-0.5
        # In fp32 from the write weights on: they are the values of the first pass, and its outputs enter a softmax.
        scores_BTHM, keys_NHKM = value_decay_attention(q_BTHK, k_BTHK, write_BTHM, g_BTHM, scale=scale,
                                                       cu_seqlens=seq.cu_seqlens, initial_state=start)
        if state is not None:
            state.tensors["keys"] = keys_NHKM
        if seq.shard is not None:
            left_BTHM = compute_decay_from_start(g_BTHM, keys_NHKM.dtype, seq.shard)
            incoming_BHKM = seq.shard.incoming(seq.shard.at_end(keys_NHKM), left_BTHM[:, -1, :, None, :], torch.mul)
            earlier_BTHM = read_incoming_state(q_BTHK, incoming_BHKM) * left_BTHM * scale
            scores_BTHM = scores_BTHM + earlier_BTHM.to(scores_BTHM.dtype)
        p_BTHM, write_BTHM = (x.to(v_BTHV.dtype) for x in (scores_BTHM.softmax(-1), write_BTHM))
        return scan_matrix_state(p_BTHM, write_BTHM, v_BTHV, g_BTHM, seq, state, name="values")

    def head_rows(self) -> dict[str, int]:
        shared = dict.fromkeys(("k_proj", "v_proj", "s_proj"), self.config.kv_heads)
        return dict.fromkeys(("q_proj", "g_proj"), self.config.num_heads) | shared

    def init_weights(self, std: float) -> None:
        """All projections are normal(0, std), as in the published code."""
        init_projections(self, std)
