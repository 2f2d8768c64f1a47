"""Softmax attention over values from which attention to earlier values is erased (DeltaFormer).

    u_t = v_t - beta_t sum_{s < t} softmax_{s < t}(q_t . k_s / sqrt(K)) u_s,     beta_t = w_beta x_t + b per query head
    y_t = W_o sum_{s <= t} softmax_{s <= t}(q_t . k_s / sqrt(K)) u_s

Source: Zhong et al. 2025, Understanding Transformer from the Perspective of Associative Memory, section 3, in the form
of its public implementation, which takes the scores of queries and keys in both places.
B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from hybridlm.model.decode_state import AttentionState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.cost import count_visible_keys
from hybridlm.model.mixers.common.dense_attention import attention_exchange_size, heads_of_all_tokens
from hybridlm.model.mixers.common.grouped_heads import GroupedHeadsConfig
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.contract import Aux, SequenceMixer, register_mixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import attention, deltaformer_values
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide

FP32_BYTES = 4  # bytes per element


@dataclass(kw_only=True)
class DeltaFormerConfig(GroupedHeadsConfig):
    """Configuration of DeltaFormer.

    Args:
        num_heads: query heads H, each with erased values of its own.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G; null is `num_heads`.
        rope: rotary embedding of queries and keys.
        qk_norm: RMS norm of queries and keys per head.
        qkv_bias: biases of q_proj, k_proj and v_proj.
    """

    kind: str = "deltaformer"
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: bool = False
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rope.check(self.head_dim)

    def _weights(self, context: LayerContext) -> int:
        H, G, K = self.num_heads, self.kv_heads, self.head_dim
        return context.hidden_size * (2 * (H + G) * K + H)

    def num_params(self, context: LayerContext) -> int:
        H, G, K = self.num_heads, self.kv_heads, self.head_dim
        return self._weights(context) + H + (H + 2 * G) * K * self.qkv_bias + 2 * K * self.qk_norm

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        pair = 4.0 * self.num_heads * self.head_dim * count_visible_keys(context_length)
        return {"projections": 2.0 * self._weights(context), "erased values": pair, "attention": pair}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the keys, and of the erased values, of which there is one per query head."""
        return context_length * (self.num_heads + self.kv_heads) * self.head_dim * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        return element_bytes * (5 * queries + 3 * keys) + FP32_BYTES * 5 * queries

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        size = attention_exchange_size(self.num_heads, self.kv_heads, self.head_dim, shards)
        sent = rows * length * (element_bytes * size + FP32_BYTES * self.num_heads)
        return [ShardTraffic("exchange", sent, sent)]

    def rotates(self) -> bool:
        return self.rope.kind != "none"


@register_mixer("deltaformer", DeltaFormerConfig)
class DeltaFormer(SequenceMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj, beta_proj with a bias [H]; by option q_norm and k_norm."""

    config: DeltaFormerConfig
    fp32_parameters: ClassVar[tuple[str, ...]] = ("q_norm.weight", "k_norm.weight")

    def __init__(self, config: DeltaFormerConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, G, K = context.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.beta_proj = nn.Linear(D, H, bias=True)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        self.q_norm = RMSNorm.of(context.norm, K) if config.qk_norm else None
        self.k_norm = RMSNorm.of(context.norm, K) if config.qk_norm else None
        self.rotary_dim = config.rope.rotary_dim(K)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: AttentionState | None = None) -> tuple[Tensor, Aux]:
        q_BTHK = self._heads(self.q_proj(x_BTD), self.q_norm, seq)
        k_BSGK = self._heads(self.k_proj(x_BTD), self.k_norm, seq)
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (-1, self.config.head_dim))
        beta_BTH = wide(self.beta_proj(x_BTD))
        if seq.shard is None:
            o_BTHK = _attend(q_BTHK, k_BSGK, v_BTGK, beta_BTH, seq.cu_seqlens, state)
        else:
            q, k, v = heads_of_all_tokens(seq.shard, [q_BTHK], [k_BSGK, v_BTGK])
            (beta,) = heads_of_all_tokens(seq.shard, [beta_BTH[..., None]], [])
            o_BTHK = seq.shard.by_tokens(_attend(q, k, v, beta[..., 0], seq.shard.borders))
        return self.o_proj(o_BTHK.flatten(-2)), {}

    def _heads(self, projected: Tensor, norm: RMSNorm | None, seq: SequenceInfo) -> Tensor:
        x_BTHK = projected.unflatten(-1, (-1, self.config.head_dim))
        return rotate(x_BTHK if norm is None else norm(x_BTHK), self.config.rope, self.rotary_dim, seq)

    def head_rows(self) -> dict[str, int]:
        return {"q_proj": self.config.num_heads, "k_proj": self.config.kv_heads, "v_proj": self.config.kv_heads}

    def new_state(self, batch: int, max_length: int) -> AttentionState:
        return AttentionState.empty(max_length)

    def init_weights(self, std: float) -> None:
        """Projections are normal(0, std), the bias of beta is 0: it starts near attention over plain values."""
        init_projections(self, std)


def _attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BTGK: Tensor, beta_BTH: Tensor, borders: CuSeqlens | None,
            state: AttentionState | None = None) -> Tensor:
    """The outputs [B, T, H, K]; the state keeps the keys, and the erased values as values."""
    past = None
    if state is not None:
        k_BSGK, past = state.keys.append(k_BSGK), state.values.kept
    u_BSHK = deltaformer_values(q_BTHK, k_BSGK, v_BTGK, beta_BTH, past_BPHV=past, cu_seqlens=borders)
    if state is not None:
        u_BSHK = state.values.append(u_BSHK)
    k_BSHK = k_BSGK.repeat_interleave(q_BTHK.shape[2] // k_BSGK.shape[2], 2)
    return attention(q_BTHK, k_BSHK, u_BSHK, cu_seqlens=borders)
