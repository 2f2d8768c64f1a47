"""mLSTM as the layer of xLSTM-7B: a matrix memory with exponential input gates, a normaliser and an output gate.

    C_t = f_t C_{t-1} + e^{i_t} k_t v_t^T,   n_t = f_t n_{t-1} + e^{i_t} k_t
    h_t = C_t^T q_t / max(|n_t . q_t|, 1)
    y_t = W_o (sigmoid(W_g x_t) * LayerNorm(h_t)),   the norm over each head

i = cap(w_i . x + b_i), f = sigmoid(cap(w_f . x + b_f)), one per head, with cap(u) = c tanh(u / c).
Source: Beck et al. 2025, xLSTM 7B, section 3; the recurrence: Beck et al. 2024, xLSTM, section 2.3.

B rows, T tokens, D hidden size, H heads, K dims of queries and keys, V dims of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.exponential_gates import (
    FP32_BYTES,
    count_activations,
    count_state,
    init_gates,
    read_exponential_state,
    state_traffic,
)
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import HeadGroupNorm
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class MLSTMConfig(StateHeadsConfig):
    """Configuration of the mLSTM layer of xLSTM-7B.

    Args:
        num_heads: heads H.
        head_dim: dims K of queries and keys.
        value_head_dim: dims V of values; null is 2 K, as published.
        gate_soft_cap: c, the bound of both gates before their activation; null has none.
        norm_eps: of the norm over each head.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "mlstm"
    num_heads: int
    head_dim: int
    value_head_dim: int | None = None
    gate_soft_cap: float | None = 15.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "value_head_dim", "gate_soft_cap", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)

    @property
    def value_dim(self) -> int:
        """Dims V of values."""
        return 2 * self.head_dim if self.value_head_dim is None else self.value_head_dim

    def _matrix_params(self, context: LayerContext) -> int:
        return context.hidden_size * self.num_heads * (2 * self.head_dim + 3 * self.value_dim + 2)

    def num_params(self, context: LayerContext) -> int:
        return self._matrix_params(context) + self.num_heads * (self.value_dim + 2)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it, with the normaliser."""
        return {"projections": 2.0 * self._matrix_params(context),
                "recurrence": 5.0 * self.num_heads * self.head_dim * (self.value_dim + 1)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        return FP32_BYTES * count_state(self.num_heads, self.head_dim, self.value_dim)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the input, the output gate and norm, and the recurrence."""
        kept = element_bytes * (context.hidden_size + 3 * self.num_heads * self.value_dim)
        return kept + FP32_BYTES * count_activations(self.num_heads, self.head_dim, self.value_dim)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: divided by a common maximum, the recurrence is linear in its state."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return state_traffic(rows, self.num_heads, self.head_dim, self.value_dim)

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        return super().canonical(norm) | {"value_head_dim": self.value_dim}

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Heads of the nearest mixer; values fill the width, keys have half their dims, as published."""
        heads = model.heads_for(cls).num_heads
        values = max(model.hidden_size // heads, 2)
        return {"num_heads": heads, "head_dim": values // 2, "value_head_dim": values}


@register_mixer("mlstm", MLSTMConfig)
class MLSTM(TensorStateMixer):
    """Parameters: q_proj, k_proj [H K, D], v_proj, g_proj [H V, D], o_proj [D, H V], i_proj, f_proj [H, D] with i_bias,
    f_bias [H], and o_norm [H V].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("i_bias", "f_bias", "o_norm.weight")
    config: MLSTMConfig

    def __init__(self, config: MLSTMConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H = context.hidden_size, config.num_heads
        self.q_proj, self.k_proj = (nn.Linear(D, H * config.head_dim, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(D, H * config.value_dim, bias=False) for _ in range(2))
        self.i_proj, self.f_proj = (nn.Linear(D, H, bias=False) for _ in range(2))
        self.i_bias, self.f_bias = (nn.Parameter(torch.zeros(H)) for _ in range(2))
        self.o_norm = HeadGroupNorm(H, H * config.value_dim, config.norm_eps, bias=False)
        self.o_proj = nn.Linear(H * config.value_dim, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        q_BTHK, k_BTHK = (proj(x_BTD).unflatten(-1, (config.num_heads, config.head_dim))
                          for proj in (self.q_proj, self.k_proj))
        v_BTHV = self.v_proj(x_BTD).unflatten(-1, (config.num_heads, config.value_dim))
        i_BTH, f_BTH = self._gate(self.i_proj(x_BTD), self.i_bias), self._gate(self.f_proj(x_BTD), self.f_bias)
        h_BTHV = read_exponential_state(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, seq, state)
        return self.o_proj(self.o_norm(h_BTHV.flatten(-2)) * self.g_proj(x_BTD).sigmoid()), {}

    def _gate(self, u_BTH: Tensor, bias_H: Tensor) -> Tensor:
        """A gate before its activation, [B, T, H] in fp32 at least."""
        u_BTH = u_BTH.to(torch.promote_types(u_BTH.dtype, torch.float32)) + bias_H
        cap = self.config.gate_soft_cap
        return u_BTH if cap is None else cap * (u_BTH / cap).tanh()

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj", "i_proj", "f_proj"), self.config.num_heads)

    def init_weights(self, std: float) -> None:
        """Gates start from their biases alone: inputs at e^-10, forget gates from sigmoid(3) to sigmoid(6)."""
        init_projections(self, std)
        init_gates(self.i_proj.weight, self.f_proj.weight, self.f_bias)
        nn.init.constant_(self.i_bias, -10.0)
