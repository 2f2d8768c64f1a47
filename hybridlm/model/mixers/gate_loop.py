"""GateLoop: linear attention whose states decay and turn by amounts that depend on the token.

    full       S_t = Diag(a_t) S_{t-1} + k_t v_t^T,   a = sigmoid(alpha) e^{i phi};   o_t = Re(S_t)^T q_t;   y = W_o o
    simple     h_t = sigmoid(alpha_t) h_{t-1} + v_t;                                 y_t = q_t h_t

The full form is real: with phi summed up to each token, Re turns into a product of queries (q cos phi, q sin phi) with
such keys. Source: Katsch 2023 (GateLoop), section 3; the simple form is that of gateloop-transformer (Wang).

B rows, T tokens, D hidden size, H heads, K dims per head, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.matrix_state import FP32_BYTES, matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.phase import accumulate_phase
from hybridlm.model.mixers.common.scan import scan_tokens, scan_traffic
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide

CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations


@dataclass(kw_only=True)
class GateLoopConfig(MixerConfig):
    """Configuration of GateLoop.

    Args:
        form: full, with a matrix of complex numbers per head, or simple, with one real number per channel.
        num_heads: heads H of the full form; the simple one has the channels of the model and no heads.
        head_dim: dims K of a head, of keys and values.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "gate_loop"
    form: Literal["full", "simple"] = "full"
    num_heads: int | None = None
    head_dim: int | None = None
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
            require(self.form == "simple" or value is not None, key, "is missing", expected="a number with form=full")
            require(self.form == "full" or value is None, key, "has no effect", got=value,
                    expected="null with form=simple")

    @property
    def heads(self) -> int:
        """Heads H of the full form."""
        return self.num_heads or 1

    def channels(self, context: LayerContext) -> int:
        """Channels C of queries, keys and values."""
        return context.hidden_size if self.form == "simple" else self.heads * (self.head_dim or 1)

    def num_params(self, context: LayerContext) -> int:
        C = self.channels(context)
        return 3 * context.hidden_size * C if self.form == "simple" else 6 * context.hidden_size * C + 2 * C

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """A complex state counts as two: decay, write and read of both."""
        C = self.channels(context)
        if self.form == "simple":
            return {"projections": 6.0 * context.hidden_size * C, "recurrence": 3.0 * C}
        return {"projections": 12.0 * context.hidden_size * C,
                "recurrence": 10.0 * C * (self.head_dim or 1) + 14.0 * C}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the states in fp32, and of the phases of the full form."""
        C = self.channels(context)
        return FP32_BYTES * (C if self.form == "simple" else 2 * C * (self.head_dim or 1) + 2 * C)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the projections, and gates, phases and states in fp32."""
        D, C = context.hidden_size, self.channels(context)
        if self.form == "simple":
            return element_bytes * (D + 2 * C) + FP32_BYTES * 4 * C
        chunk = 2 * C * (self.head_dim or 1) / CHUNK_TOKENS + 2 * self.heads * CHUNK_TOKENS
        return element_bytes * (D + 4 * C) + FP32_BYTES * (26 * C + chunk)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: the recurrence is linear in its state, and phases add up."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        C = self.channels(context)
        if self.form == "simple":
            return [scan_traffic(rows, C)]
        K = self.head_dim or 1
        return [scan_traffic(rows, 2 * C), matrix_traffic(rows, self.heads, 2 * K, K, 2 * C)]

    @classmethod
    def missing_sizes(cls, options: Mapping[str, Any]) -> list[str]:
        if options.get("form") == "simple":
            return []
        return [key for key in ("num_heads", "head_dim") if options.get(key) is None]

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        heads = model.heads_for(cls)
        return {"num_heads": heads.num_heads, "head_dim": heads.head_dim}

    def state_heads(self) -> int | None:
        return self.num_heads

    def with_state_heads(self, count: int) -> Self:
        return replace(self, num_heads=count)


@register_mixer("gate_loop", GateLoopConfig)
class GateLoop(TensorStateMixer):
    """Parameters: q_proj, v_proj and alpha_proj [C, D]; in the full form also k_proj and phi_proj [C, D], biases of
    alpha_proj and phi_proj, and o_proj [D, C].
    """

    config: GateLoopConfig

    def __init__(self, config: GateLoopConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, C, full = context.hidden_size, config.channels(context), config.form == "full"
        self.q_proj, self.v_proj = (nn.Linear(D, C, bias=False) for _ in range(2))
        self.alpha_proj = nn.Linear(D, C, bias=full)
        self.k_proj = nn.Linear(D, C, bias=False) if full else None
        self.phi_proj = nn.Linear(D, C) if full else None
        self.o_proj = nn.Linear(C, D, bias=False) if full else None

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        q_BTC, v_BTC, alpha_BTC = self.q_proj(x_BTD), self.v_proj(x_BTD), wide(self.alpha_proj(x_BTD))
        if self.k_proj is None or self.phi_proj is None or self.o_proj is None:
            h_BTC = scan_tokens(wide(v_BTC), alpha_BTC.sigmoid(), seq, state)
            return (q_BTC * h_BTC).to(x_BTD.dtype), {}
        k_BTC = self.k_proj(x_BTD)
        cos_BTC, sin_BTC = accumulate_phase(wide(self.phi_proj(x_BTD)), seq, state)
        q_BTHX, k_BTHX = (torch.cat([self._heads(x_BTC * cos_BTC), self._heads(x_BTC * sin_BTC)], -1).to(x_BTD.dtype)
                          for x_BTC in (q_BTC, k_BTC))
        g_BTHK = self._heads(F.logsigmoid(alpha_BTC))
        o_BTHK = scan_matrix_state(q_BTHX, k_BTHX, self._heads(v_BTC), torch.cat([g_BTHK, g_BTHK], -1), seq, state)
        return self.o_proj(o_BTHK.flatten(-2)), {}

    def _heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (self.config.heads, -1))

    def head_rows(self) -> dict[str, int]:
        if self.config.form == "simple":
            return {}
        return dict.fromkeys(("q_proj", "k_proj", "v_proj", "alpha_proj", "phi_proj"), self.config.heads)

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
