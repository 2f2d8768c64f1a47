"""Softmax attention whose positions are products of reflections that depend on the tokens (PaTH).

    w_t = l2norm(silu(conv(W_b W_a x_t))) per key/value head,     beta_t = 2 sigmoid(w_beta x_t + b)
    o_t = sum_s softmax_s(q_t^T H_t ... H_{s+1} k_s / sqrt(K)) v_s,     H_i = I - beta_i w_i w_i^T
    y_t = W_o o_t

With a forget gate (PaTH-FoX), log f_{s+1} + ... + log f_t is added to the scores, f_t = sigmoid(W_f x_t + b_f).

Source: Yang et al. 2025, PaTH Attention: Position Encoding via Accumulating Householder Transformations.
B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv
from hybridlm.model.mixers.common.cost import count_low_rank_params, count_visible_keys
from hybridlm.model.mixers.common.dense_attention import attention_exchange_size, heads_of_all_tokens
from hybridlm.model.mixers.common.grouped_heads import GroupedHeadsConfig
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.contract import Aux, SequenceMixer, register_mixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import l2_norm, path_attention
from hybridlm_kernels.ops.path_attention import move_keys
from hybridlm_kernels.precision import wide

FP32_BYTES = 4  # bytes per element


@dataclass(kw_only=True)
class PathAttentionConfig(GroupedHeadsConfig):
    """Configuration of PaTH attention.

    Args:
        num_heads: query heads H.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G, each with reflections of its own; null is `num_heads`.
        w_rank: rank of the projection to w; null is one full projection.
        conv_size: taps of the convolution over w, which SiLU follows; 0 has none.
        qk_norm: RMS norm of queries and keys per head.
        forget_gate: a forget gate per query head beside the reflections.

    Raises:
        ConfigError: a size that cannot be, and as for `GroupedHeadsConfig`.
    """

    kind: str = "path_attention"
    w_rank: int | None = 32
    conv_size: int = 3
    qk_norm: bool = False
    forget_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.w_rank is None or self.w_rank > 0, "w_rank", "must be positive", got=self.w_rank)
        require(self.conv_size >= 0 and self.conv_size != 1, "conv_size", "is not a convolution", got=self.conv_size,
                expected="0 (none), or 2 taps and more")

    def _weights(self, context: LayerContext) -> int:
        D, H, G, K = context.hidden_size, self.num_heads, self.kv_heads, self.head_dim
        return 2 * D * (H + G) * K + count_low_rank_params(D, G * K, self.w_rank) + D * (G + H * self.forget_gate)

    def num_params(self, context: LayerContext) -> int:
        H, G, K = self.num_heads, self.kv_heads, self.head_dim
        vectors = G * K * self.conv_size + G + H * self.forget_gate + 2 * K * self.qk_norm
        return self._weights(context) + vectors

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The reflections are counted as the chunk form applies them: K more per query head and visible key."""
        H, G, K = self.num_heads, self.kv_heads, self.head_dim
        keys = count_visible_keys(context_length)
        return {"projections": 2.0 * self._weights(context), "conv": 2.0 * self.conv_size * G * K,
                "attention": 4.0 * H * K * keys, "reflections": 4.0 * H * K * K * keys / 64}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the moved keys and the gates in fp32, and of the values and inputs of the convolution."""
        width = self.kv_heads * self.head_dim
        kept = width * (FP32_BYTES + element_bytes) + FP32_BYTES * self.num_heads * self.forget_gate
        return context_length * kept + max(self.conv_size - 1, 0) * width * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        return element_bytes * (3 * queries + 6 * keys) + FP32_BYTES * (8 * queries + 3 * 64 * self.num_heads)

    def check_context_parallel(self, shards: int, length: int) -> None:
        super().check_context_parallel(shards, length)
        require(self.conv_size <= length + 1, "conv_size", "reaches over more than one shard of a split row",
                got=self.conv_size, expected=f"at most {length + 1} taps",
                hint="a smaller engine.context_parallel, or longer sequences")

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        H, G, K = self.num_heads, math.lcm(self.kv_heads, shards), self.head_dim
        size = element_bytes * (attention_exchange_size(H, self.kv_heads, K, shards) + G * K)
        sent = rows * length * (size + FP32_BYTES * (G + H * self.forget_gate))
        found = [ShardTraffic("exchange", sent, sent)]
        tail = rows * max(self.conv_size - 1, 0) * self.kv_heads * K * element_bytes
        return [*found, ShardTraffic("from_previous", tail, tail)] if tail else found


@register_mixer("path_attention", PathAttentionConfig)
class PathAttention(SequenceMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj, w_proj or w_a_proj and w_b_proj, w_conv, beta_proj with a bias [G];
    by option q_norm, k_norm, f_proj with a bias [H].
    """

    config: PathAttentionConfig
    fp32_parameters: ClassVar[tuple[str, ...]] = ("q_norm.weight", "k_norm.weight")

    def __init__(self, config: PathAttentionConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, G, K = context.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, G * K, bias=False)
        self.v_proj = nn.Linear(D, G * K, bias=False)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        if config.w_rank is None:
            self.w_proj = nn.Linear(D, G * K, bias=False)
        else:
            self.w_a_proj = nn.Linear(D, config.w_rank, bias=False)
            self.w_b_proj = nn.Linear(config.w_rank, G * K, bias=False)
        self.w_conv = CausalConv(G * K, config.conv_size, bias=False) if config.conv_size else None
        self.beta_proj = nn.Linear(D, G, bias=True)
        self.f_proj = nn.Linear(D, H, bias=True) if config.forget_gate else None
        self.q_norm = RMSNorm.of(context.norm, K) if config.qk_norm else None
        self.k_norm = RMSNorm.of(context.norm, K) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        q_BTHK, k_BTGK, v_BSGK = (proj(x_BTD).unflatten(-1, (-1, self.config.head_dim))
                                  for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        w_BTGK = self._directions(x_BTD, seq, state)
        beta_BTG = 2.0 * wide(self.beta_proj(x_BTD)).sigmoid()
        g_BSH = None if self.f_proj is None else F.logsigmoid(wide(self.f_proj(x_BTD)))
        past_BPGK = None
        if state is not None:
            past_BPGK = state.tensors.get("keys")
            state.tensors["keys"] = move_keys(past_BPGK, k_BTGK, w_BTGK, beta_BTG).detach()
            v_BSGK = _append(state, "values", v_BSGK)
            g_BSH = None if g_BSH is None else _append(state, "log_gates", g_BSH)
        o_BTHK = self._attend(q_BTHK, k_BTGK, v_BSGK, w_BTGK, beta_BTG, g_BSH, past_BPGK, seq)
        return self.o_proj(o_BTHK.flatten(-2)), {}

    def _directions(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None) -> Tensor:
        """The directions w [B, T, G, K] of length one."""
        w_BTC = self.w_proj(x_BTD) if self.config.w_rank is None else self.w_b_proj(self.w_a_proj(x_BTD))
        if self.w_conv is not None:
            w_BTC = self.w_conv(w_BTC, seq, state)
        return l2_norm(w_BTC.unflatten(-1, (-1, self.config.head_dim)))

    def _attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BSGK: Tensor, w_BTGK: Tensor, beta_BTG: Tensor,
                g_BSH: Tensor | None, past_BPGK: Tensor | None, seq: SequenceInfo) -> Tensor:
        shard = seq.shard
        if shard is None:
            return path_attention(q_BTHK, k_BTGK, v_BSGK, w_BTGK, beta_BTG, g_BSH=g_BSH, past_BPGK=past_BPGK,
                                  cu_seqlens=seq.cu_seqlens)
        q, k, v, w = heads_of_all_tokens(shard, [q_BTHK], [k_BTGK, v_BSGK, w_BTGK])
        gates = [] if g_BSH is None else [g_BSH[..., None]]
        *g, beta = (x[..., 0] for x in heads_of_all_tokens(shard, gates, [beta_BTG[..., None]]))
        return shard.by_tokens(path_attention(q, k, v, w, beta, g_BSH=g[0] if g else None, cu_seqlens=shard.borders))

    def head_rows(self) -> dict[str, int]:
        groups = self.config.kv_heads
        return {"q_proj": self.config.num_heads, "k_proj": groups, "v_proj": groups, "w_proj": groups,
                "w_b_proj": groups}

    def new_state(self, batch: int, max_length: int) -> TensorState:
        return TensorState()

    def init_weights(self, std: float) -> None:
        """Projections are normal(0, std), biases 0: reflections start near projections, beta = 1."""
        init_projections(self, std)
        if self.w_conv is not None:
            self.w_conv.reset_parameters()


def _append(state: TensorState, name: str, x_BTX: Tensor) -> Tensor:
    """Add tokens [B, T, ...] to those that the state holds under `name`; returns all of them."""
    before = state.tensors.get(name)
    x_BTX = x_BTX.detach()
    state.tensors[name] = x_BTX if before is None else torch.cat([before, x_BTX], 1)
    return state.tensors[name]
