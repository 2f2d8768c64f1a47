"""HGRN-2: gated linear attention whose keys are what the forget gate lets go.

    f = b + (1 - b) sigmoid(W_f x);   S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T;   o_t = S_t^T phi(W_q x_t)
    out = W_o RMSNorm(o),   over all heads together

b is one cumulative softmax over layers, 0 in the first. Source: Qin et al. 2024 (HGRN2), section 3.

B rows, T tokens, D hidden size, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.lower_bound import BoundedConfig, BoundedMixer
from hybridlm.model.mixers.common.matrix_state import FP32_BYTES, matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide

CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations


@dataclass(kw_only=True)
class HGRN2Config(BoundedConfig, StateHeadsConfig):
    """Configuration of HGRN-2.

    Args:
        num_heads: heads H.
        head_dim: dims K of a head's forget gate and queries.
        value_head_dim: dims V of its values; null is K.
        lower_bound: whether the forget gates have lower bounds.
        query_map: phi, silu or sigmoid.
        value_map: of the values, none or silu.
        norm_eps: of the output norm; null takes the model's.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "hgrn2"
    num_heads: int
    head_dim: int
    value_head_dim: int | None = None
    query_map: Literal["silu", "sigmoid"] = "silu"
    value_map: Literal["none", "silu"] = "none"
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "value_head_dim", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)

    @property
    def keys(self) -> int:
        """Channels H K of the forget gate."""
        return self.num_heads * self.head_dim

    @property
    def values(self) -> int:
        """Channels H V of the values."""
        return self.num_heads * (self.head_dim if self.value_head_dim is None else self.value_head_dim)

    def gate_channels(self, context: LayerContext) -> int:
        return self.keys

    def _weights(self, context: LayerContext) -> int:
        return context.hidden_size * 2 * (self.keys + self.values)

    def num_params(self, context: LayerContext) -> int:
        return self._weights(context) + self.values + self.keys * self.bounds_owned(context)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it: decay, write and read of every state."""
        return {"projections": 2.0 * self._weights(context), "recurrence": 5.0 * self.head_dim * self.values}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the states in fp32."""
        return FP32_BYTES * self.head_dim * self.values

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the projections, and gates and the chunked operation in fp32."""
        chunk = self.head_dim * self.values / CHUNK_TOKENS + 2 * self.num_heads * CHUNK_TOKENS
        return (element_bytes * (context.hidden_size + 2 * self.keys + 4 * self.values)
                + FP32_BYTES * (9 * self.keys + self.values + chunk))

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: the recurrence is linear in its state."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return [matrix_traffic(rows, self.num_heads, self.head_dim, self.values // self.num_heads, self.keys)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        return super().canonical(norm) | {"value_head_dim": self.values // self.num_heads}


@register_mixer("hgrn2", HGRN2Config)
class HGRN2(BoundedMixer):
    """Parameters: q_proj and f_proj [H K, D], v_proj [H V, D], o_proj [D, H V], o_norm [H V]; lower_bounds [L, H K] in
    the first layer.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("lower_bounds", "o_norm.weight")
    config: HGRN2Config

    def __init__(self, config: HGRN2Config, context: LayerContext):
        super().__init__(config, context)
        self.config = config
        D = context.hidden_size
        self.q_proj, self.f_proj = (nn.Linear(D, config.keys, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(D, config.values, bias=False)
        self.o_norm = RMSNorm(config.values, context.norm.eps_or(config.norm_eps))
        self.o_proj = nn.Linear(config.values, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        q_BTC, f_BTC, v_BTX = self.q_proj(x_BTD), wide(self.f_proj(x_BTD)), self.v_proj(x_BTD)
        q_BTC = F.silu(q_BTC) if config.query_map == "silu" else q_BTC.sigmoid()
        v_BTX = F.silu(v_BTX) if config.value_map == "silu" else v_BTX
        bound_C = self.read_lower_bound(seq)
        k_BTC, g_BTC = (-f_BTC).sigmoid(), F.logsigmoid(f_BTC)
        if bound_C is not None:
            k_BTC = (1.0 - bound_C) * k_BTC
            g_BTC = (bound_C + (1.0 - bound_C) * f_BTC.sigmoid()).log()
        q_BTHK, k_BTHK, v_BTHV, g_BTHK = (x.unflatten(-1, (config.num_heads, -1)) for x in (
            q_BTC, k_BTC.to(q_BTC.dtype), v_BTX, g_BTC))
        o_BTHV = scan_matrix_state(q_BTHK, k_BTHK, v_BTHV, g_BTHK, seq, state)
        return self.o_proj(self.o_norm(o_BTHV.flatten(-2))), {}

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("q_proj", "f_proj", "v_proj"), self.config.num_heads)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"lower_bounds": VECTOR}, self.head_rows())

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Bounds grow evenly from layer to layer (the authors' code, flash-linear-attention)."""
        init_projections(self, std)
        if self.lower_bounds is not None:
            nn.init.zeros_(self.lower_bounds)
