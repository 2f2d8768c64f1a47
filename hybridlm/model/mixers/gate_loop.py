"""GateLoop: linear attention whose states decay and turn by amounts that depend on the token.

    S_t = Diag(a_t) S_{t-1} + k_t v_t^T,   a = sigmoid(alpha) e^{i phi};   o_t = Re(S_t)^T q_t;   y = W_o o

It is computed with real numbers: with phi summed up to each token, Re turns into a product of queries (q cos phi,
q sin phi) with such keys. Source: Katsch 2023 (GateLoop), section 3.

B rows, T tokens, D hidden size, H heads, K dims per head, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.matrix_state import FP32_BYTES, matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.phase import accumulate_phase
from hybridlm.model.mixers.common.scan import scan_traffic
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide

CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations


@dataclass(kw_only=True)
class GateLoopConfig(StateHeadsConfig):
    """Configuration of GateLoop.

    Args:
        num_heads: heads H.
        head_dim: dims K of a head, of keys and values.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "gate_loop"
    num_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))

    @property
    def channels(self) -> int:
        """Channels C of queries, keys and values."""
        return self.num_heads * self.head_dim

    def num_params(self, context: LayerContext) -> int:
        return 6 * context.hidden_size * self.channels + 2 * self.channels

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """A complex state counts as two: decay, write and read of both."""
        return {"projections": 12.0 * context.hidden_size * self.channels,
                "recurrence": 10.0 * self.channels * self.head_dim + 14.0 * self.channels}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the states and phases in fp32."""
        return FP32_BYTES * 2 * self.channels * (self.head_dim + 1)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the projections, and gates, phases and states in fp32."""
        chunk = 2 * self.channels * self.head_dim / CHUNK_TOKENS + 2 * self.num_heads * CHUNK_TOKENS
        return element_bytes * (context.hidden_size + 4 * self.channels) + FP32_BYTES * (26 * self.channels + chunk)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: the recurrence is linear in its state, and phases add up."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        C, K = self.channels, self.head_dim
        return [scan_traffic(rows, 2 * C), matrix_traffic(rows, self.num_heads, 2 * K, K, 2 * C)]


@register_mixer("gate_loop", GateLoopConfig)
class GateLoop(TensorStateMixer):
    """Parameters: q_proj, k_proj, v_proj [C, D], alpha_proj and phi_proj [C, D] with biases, o_proj [D, C]."""

    config: GateLoopConfig

    def __init__(self, config: GateLoopConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, C = context.hidden_size, config.channels
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, C, bias=False) for _ in range(3))
        self.alpha_proj, self.phi_proj = (nn.Linear(D, C) for _ in range(2))
        self.o_proj = nn.Linear(C, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        cos_BTC, sin_BTC = accumulate_phase(wide(self.phi_proj(x_BTD)), seq, state)
        q_BTHX, k_BTHX = (torch.cat([self._heads(y_BTC * cos_BTC), self._heads(y_BTC * sin_BTC)], -1).to(x_BTD.dtype)
                          for y_BTC in (self.q_proj(x_BTD), self.k_proj(x_BTD)))
        g_BTHK = self._heads(F.logsigmoid(wide(self.alpha_proj(x_BTD))))
        o_BTHK = scan_matrix_state(q_BTHX, k_BTHX, self._heads(self.v_proj(x_BTD)), torch.cat([g_BTHK, g_BTHK], -1),
                                   seq, state)
        return self.o_proj(o_BTHK.flatten(-2)), {}

    def _heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (self.config.num_heads, -1))

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("q_proj", "k_proj", "v_proj", "alpha_proj", "phi_proj"), self.config.num_heads)

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
