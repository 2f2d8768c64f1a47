"""Softmax attention with a forget gate (Forgetting Transformer, FoX).

    f_t = sigmoid(W_f x_t + b_f)                                one per query head
    o_t = sum_s softmax_s(q_t . k_s / sqrt(K) + log f_{s+1} + ... + log f_t) v_s
    y_t = W_o o_t                                               in the Pro block: W_o (norm(o_t) * sigmoid(W_g x_t))

The Pro block normalises queries and keys per head and shifts keys and values: z_t = a_t z'_{t-1} + (1 - a_t) z'_t with
z'_t = W_z x_t and a_t = sigmoid(w_z x_t) per key/value head; keys are normalised after that.

Source: Lin et al. 2025, Forgetting Transformer: Softmax Attention with a Forget Gate, sections 3 and 4.1.
B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState, TokenCache
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.cost import count_visible_keys
from hybridlm.model.mixers.common.dense_attention import attention_exchange_size, heads_of_all_tokens
from hybridlm.model.mixers.common.grouped_heads import GroupedHeadsConfig
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.output_gate import OutputGate, apply_output_gate, build_output_gate, gate_width
from hybridlm.model.mixers.common.token_shift import lerp_with_previous, previous_tokens
from hybridlm.model.mixers.contract import Aux, SequenceMixer, register_mixer
from hybridlm.model.norm import HeadRMSNorm
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import forgetting_attention
from hybridlm_kernels.precision import wide

FP32_BYTES = 4  # bytes per element


def no_rope() -> RopeConfig:
    """The published models rotate nothing: the gates tell positions apart."""
    return RopeConfig(kind="none")


@dataclass(kw_only=True)
class ForgettingAttentionConfig(GroupedHeadsConfig):
    """Configuration of softmax attention with a forget gate.

    Args:
        num_heads: query heads H, each with a forget gate.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G; null is `num_heads`.
        rope: rotary embedding of queries and keys.
        qk_norm: RMS norm of queries and keys per head, with a weight per head and channel.
        qk_norm_eps: of these norms.
        kv_shift: mixes keys and values with those of the token before.
        output_norm: RMS norm of the output per head, with a weight per head and channel.
        output_norm_eps: null takes the model's.
        output_gate: a sigmoid gate per element or per head of the output, behind its norm.
        window: keys that a token sees, its own included; null sees all earlier ones.
    """

    kind: str = "forgetting_attention"
    rope: RopeConfig = field(default_factory=no_rope)
    qk_norm: bool = False
    qk_norm_eps: float = 1e-5
    kv_shift: bool = False
    output_norm: bool = False
    output_norm_eps: float | None = None
    output_gate: OutputGate = "none"
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rope.check(self.head_dim)
        self.check_window(self.window)
        for key in ("qk_norm_eps", "output_norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)

    def _gate_width(self) -> int:
        return gate_width(self.output_gate, self.num_heads, self.head_dim)

    def _weights(self, context: LayerContext) -> int:
        H, G, K = self.num_heads, self.kv_heads, self.head_dim
        return context.hidden_size * (2 * H * K + 2 * G * K + H + self._gate_width() + 2 * G * self.kv_shift)

    def num_params(self, context: LayerContext) -> int:
        H, G, K = self.num_heads, self.kv_heads, self.head_dim
        return self._weights(context) + H + (H + G) * K * self.qk_norm + H * K * self.output_norm

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        keys = count_visible_keys(context_length, self.window)
        return {"projections": 2.0 * self._weights(context), "attention": 4.0 * self.num_heads * self.head_dim * keys}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of keys, values and unshifted last ones in the dtype of the model, and of the gates in fp32."""
        kept = context_length if self.window is None else min(context_length, self.window - 1)
        pair = 2 * self.kv_heads * self.head_dim * element_bytes
        return kept * (pair + FP32_BYTES * self.num_heads) + pair * self.kv_shift

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        inputs = queries + 2 * keys + (queries + keys) * self.qk_norm + 4 * keys * self.kv_shift
        outputs = queries * (1 + self.output_norm) + 2 * self._gate_width()
        return element_bytes * (inputs + outputs) + FP32_BYTES * 4 * self.num_heads

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        tokens = rows * length
        sent = attention_exchange_size(self.num_heads, self.kv_heads, self.head_dim, shards)
        sent = tokens * (element_bytes * sent + FP32_BYTES * self.num_heads)
        found = [ShardTraffic("exchange", sent, sent)]
        if self.kv_shift:
            tail = rows * 2 * self.kv_heads * self.head_dim * element_bytes
            found.append(ShardTraffic("from_previous", tail, tail))
        return found

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        if not self.qk_norm:
            del data["qk_norm_eps"]
        data["output_norm_eps"] = None if not self.output_norm else self.output_norm_eps or norm.eps
        return data

    def rotates(self) -> bool:
        return self.rope.kind != "none"


@dataclass
class ForgettingState:
    """Decode state: keys and values [B, S, G, K], logarithms of the gates [B, S, H], last unshifted keys and values."""

    keys: TokenCache
    values: TokenCache
    log_gates: TokenCache
    shifts: TensorState

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(part.num_bytes for part in (self.keys, self.values, self.log_gates, self.shifts))


@register_mixer("forgetting_attention", ForgettingAttentionConfig)
class ForgettingAttention(SequenceMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj, f_proj with a bias [H]; by option q_norm, k_norm, o_norm, g_proj,
    k_shift_proj and v_shift_proj [G, D].
    """

    config: ForgettingAttentionConfig
    fp32_parameters: ClassVar[tuple[str, ...]] = ("q_norm.weight", "k_norm.weight", "o_norm.weight")

    def __init__(self, config: ForgettingAttentionConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, G, K = context.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, G * K, bias=False)
        self.v_proj = nn.Linear(D, G * K, bias=False)
        self.f_proj = nn.Linear(D, H, bias=True)
        self.k_shift_proj = nn.Linear(D, G, bias=False) if config.kv_shift else None
        self.v_shift_proj = nn.Linear(D, G, bias=False) if config.kv_shift else None
        self.q_norm = HeadRMSNorm(H, K, config.qk_norm_eps) if config.qk_norm else None
        self.k_norm = HeadRMSNorm(G, K, config.qk_norm_eps) if config.qk_norm else None
        self.o_norm = HeadRMSNorm(H, K, config.output_norm_eps or context.norm.eps) if config.output_norm else None
        self.g_proj = build_output_gate(config.output_gate, D, H, K, bias=False)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        self.rotary_dim = config.rope.rotary_dim(K)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: ForgettingState | None = None) -> tuple[Tensor, Aux]:
        shifts = None if state is None else state.shifts
        q_BTHK = self._heads(self.q_proj(x_BTD), self.q_norm, seq)
        k_BSGK = self._heads(self._shifted(x_BTD, "k", seq, shifts), self.k_norm, seq)
        v_BSGK = self._shifted(x_BTD, "v", seq, shifts).unflatten(-1, (-1, self.config.head_dim))
        g_BSH = F.logsigmoid(wide(self.f_proj(x_BTD)))
        if state is not None:
            k_BSGK, v_BSGK = state.keys.append(k_BSGK), state.values.append(v_BSGK)
            g_BSH = state.log_gates.append(g_BSH)
        o_BTHK = self._attend(q_BTHK, k_BSGK, v_BSGK, g_BSH, seq)
        if self.o_norm is not None:
            o_BTHK = self.o_norm(o_BTHK)
        return self.o_proj(apply_output_gate(o_BTHK, x_BTD, self.g_proj, self.config.output_gate)), {}

    def _heads(self, projected: Tensor, norm: HeadRMSNorm | None, seq: SequenceInfo) -> Tensor:
        x_BTHK = projected.unflatten(-1, (-1, self.config.head_dim))
        return rotate(x_BTHK if norm is None else norm(x_BTHK), self.config.rope, self.rotary_dim, seq)

    def _shifted(self, x_BTD: Tensor, name: str, seq: SequenceInfo, shifts: TensorState | None) -> Tensor:
        """Keys or values [B, T, G K], mixed with those of the token before where the config says so."""
        projected_BTC = getattr(self, f"{name}_proj")(x_BTD)
        gate_proj = getattr(self, f"{name}_shift_proj")
        if gate_proj is None:
            return projected_BTC
        before_BTC = previous_tokens(projected_BTC, seq, shifts, name)
        share_BTC = wide(gate_proj(x_BTD)).sigmoid().repeat_interleave(self.config.head_dim, -1)
        return lerp_with_previous(projected_BTC, before_BTC, share_BTC).to(projected_BTC.dtype)

    def _attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, g_BSH: Tensor, seq: SequenceInfo) -> Tensor:
        window, shard = self.config.window, seq.shard
        if shard is None:
            return forgetting_attention(q_BTHK, k_BSGK, v_BSGK, g_BSH, window=window, cu_seqlens=seq.cu_seqlens)
        q, k, v = heads_of_all_tokens(shard, [q_BTHK], [k_BSGK, v_BSGK])
        (g,) = heads_of_all_tokens(shard, [g_BSH[..., None]], [])
        return shard.by_tokens(forgetting_attention(q, k, v, g[..., 0], window=window, cu_seqlens=shard.borders))

    def head_rows(self) -> dict[str, int]:
        heads, groups = self.config.num_heads, self.config.kv_heads
        gate = {"g_proj": heads} if self.config.output_gate == "element" else {}
        return {"q_proj": heads, "k_proj": groups, "v_proj": groups, **gate}

    def new_state(self, batch: int, max_length: int) -> ForgettingState:
        keys, values, log_gates = (TokenCache(max_length, self.config.window) for _ in range(3))
        return ForgettingState(keys, values, log_gates, TensorState())

    def init_weights(self, std: float) -> None:
        """Projections are normal(0, std), the bias of the forget gate is 0, so that gates start near 1/2."""
        init_projections(self, std)
