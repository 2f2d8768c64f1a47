"""The simple form of GateLoop: one real number per channel, which decays by the token.

    h_t = sigmoid(W_alpha x_t) h_{t-1} + W_v x_t;   y_t = W_q x_t * h_t

Source: gateloop-transformer (Wang), SimpleGateLoopLayer, after Katsch 2023 (GateLoop).

B rows, T tokens, D hidden size and channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.scan import FP32_BYTES, scan_tokens, scan_traffic
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class SimpleGateLoopConfig(MixerConfig):
    """Configuration of the simple GateLoop, which has no options: it has as many channels as the model has dims."""

    kind: str = "simple_gate_loop"
    is_linear: ClassVar[bool] = True

    def num_params(self, context: LayerContext) -> int:
        return 3 * context.hidden_size**2

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        return {"projections": 6.0 * context.hidden_size**2, "recurrence": 3.0 * context.hidden_size}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        return FP32_BYTES * context.hidden_size

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: input and projections, and the scan in fp32."""
        return context.hidden_size * (3.0 * element_bytes + 4.0 * FP32_BYTES)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: the recurrence is linear in its state."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return [scan_traffic(rows, context.hidden_size)]


@register_mixer("simple_gate_loop", SimpleGateLoopConfig)
class SimpleGateLoop(TensorStateMixer):
    """Parameters: q_proj, v_proj, alpha_proj [D, D]."""

    config: SimpleGateLoopConfig

    def __init__(self, config: SimpleGateLoopConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D = context.hidden_size
        self.q_proj, self.v_proj, self.alpha_proj = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        keep_BTD = wide(self.alpha_proj(x_BTD)).sigmoid()
        h_BTD = scan_tokens(wide(self.v_proj(x_BTD)), keep_BTD, seq, state)
        return (self.q_proj(x_BTD) * h_BTD).to(x_BTD.dtype), {}

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
