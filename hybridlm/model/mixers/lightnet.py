"""LightNet: linear attention whose keys are a softmax over the tokens so far, so that no decay multiplies up.

    z_t = log(e^{k_1} + ... + e^{k_t});   S_t = Diag(e^{z_{t-1} - z_t}) S_{t-1} + e^{k_t - z_t} v_t^T
    o_t = scale S_t^T silu(q_t);          out = W_o (RMSNorm(o) * silu(W_2 W_1 x)),   over all heads together

Each row of the state is the mean of all values, weighted by the softmax of one channel of the keys over time.

Source: Qin et al. 2024 (You Only Scan Once: LightNet), section 3, in the layer of flash-linear-attention.

B rows, T tokens, D hidden size, H heads, K key dim, V value dim, C key channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.cumulative_softmax import cumulative_softmax, cumulative_softmax_traffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.matrix_state import FP32_BYTES, matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.norm import GatedRMSNorm
from hybridlm.model.sequence import SequenceInfo

CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations


@dataclass(kw_only=True)
class LightNetConfig(StateHeadsConfig):
    """Configuration of LightNet.

    Args:
        num_heads: heads H.
        head_dim: dims K of queries and keys.
        value_head_dim: dims V of values; null is K.
        output_gate_rank: rank of the output gate.
        norm_eps: of the output norm; null takes the model's.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "lightnet"
    num_heads: int
    head_dim: int
    value_head_dim: int | None = None
    output_gate_rank: int = 128
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "value_head_dim", "output_gate_rank", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)

    @property
    def value_dim(self) -> int:
        """Dims V of values."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def keys(self) -> int:
        """Channels C = H K of queries and keys."""
        return self.num_heads * self.head_dim

    @property
    def values(self) -> int:
        """Channels H V of the values."""
        return self.num_heads * self.value_dim

    def _weights(self, context: LayerContext) -> int:
        D, rank = context.hidden_size, self.output_gate_rank
        return D * (2 * self.keys + 2 * self.values + rank) + rank * self.values

    def num_params(self, context: LayerContext) -> int:
        return self._weights(context) + self.values

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Decay, write and read of every state, and ten operations per channel of the softmax over time."""
        return {"projections": 2.0 * self._weights(context),
                "recurrence": 5.0 * self.head_dim * self.values + 10.0 * self.keys}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the states, and of a sum and a maximum per key channel, in fp32."""
        return FP32_BYTES * (self.head_dim * self.values + 2 * self.keys)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the projections, and softmax and chunked operation in fp32."""
        chunk = self.head_dim * self.values / CHUNK_TOKENS + 2 * self.num_heads * CHUNK_TOKENS
        return (element_bytes * (context.hidden_size + 3 * self.keys + 5 * self.values + self.output_gate_rank)
                + FP32_BYTES * (15 * self.keys + self.values + chunk))

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: the recurrence is linear in its state, and sums are divided by a common maximum."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return [*cumulative_softmax_traffic(rows, self.keys),
                matrix_traffic(rows, self.num_heads, self.head_dim, self.value_dim, self.keys)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        return super().canonical(norm) | {"value_head_dim": self.value_dim}


@register_mixer("lightnet", LightNetConfig)
class LightNet(TensorStateMixer):
    """Parameters: q_proj and k_proj [H K, D], v_proj [H V, D], g_a_proj [R, D], g_b_proj [H V, R], o_norm [H V], o_proj
    [D, H V].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("o_norm.weight",)
    config: LightNetConfig

    def __init__(self, config: LightNetConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D = context.hidden_size
        self.q_proj, self.k_proj = (nn.Linear(D, config.keys, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(D, config.values, bias=False)
        self.g_a_proj = nn.Linear(D, config.output_gate_rank, bias=False)
        self.g_b_proj = nn.Linear(config.output_gate_rank, config.values, bias=False)
        self.o_norm = GatedRMSNorm(config.values, context.norm.eps_or(config.norm_eps), "silu")
        self.o_proj = nn.Linear(config.values, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        write_BTC, g_BTC = cumulative_softmax(self.k_proj(x_BTD), seq, state)
        q_BTHK, k_BTHK, v_BTHV, g_BTHK = (y.unflatten(-1, (self.config.num_heads, -1)) for y in (
            F.silu(self.q_proj(x_BTD)), write_BTC.to(x_BTD.dtype), self.v_proj(x_BTD), g_BTC))
        o_BTHV = scan_matrix_state(q_BTHK, k_BTHK, v_BTHV, g_BTHK, seq, state, scale=self.config.head_dim**-0.5)
        return self.o_proj(self.o_norm(o_BTHV.flatten(-2), self.g_b_proj(self.g_a_proj(x_BTD)))), {}

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("q_proj", "k_proj", "v_proj"), self.config.num_heads)

    def init_weights(self, std: float) -> None:
        """All projections are normal(0, std), as in the published code."""
        init_projections(self, std)
