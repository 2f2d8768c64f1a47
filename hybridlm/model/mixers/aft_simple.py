"""AFT-simple: an attention-free mixer, a mean of past values that is weighted by exponentials of their keys.

    y_t = sum_{s<=t} e^{k_s} v_s / sum_{s<=t} e^{k_s};   out = W_o (sigmoid(q) * y),   channel by channel

Source: Zhai et al. 2021, An attention free transformer, section 3.2, AFT-simple in its causal form.

B rows, T tokens, D hidden size and channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.log_sum import FP32_BYTES, mean_traffic, read_weighted_mean
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class AFTSimpleConfig(MixerConfig):
    """Configuration of AFT-simple, which has no options: it has as many channels as the model has dims."""

    kind: str = "aft_simple"
    is_linear: ClassVar[bool] = True

    def num_params(self, context: LayerContext) -> int:
        return 4 * context.hidden_size**2

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it: two sums and their quotient."""
        return {"projections": 8.0 * context.hidden_size**2, "recurrence": 5.0 * context.hidden_size}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of both sums and the maximum in fp32."""
        return 3 * FP32_BYTES * context.hidden_size

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: input and projections, and the recurrence in fp32."""
        return context.hidden_size * (5.0 * element_bytes + 22.0 * FP32_BYTES)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: divided by a common maximum, both sums are linear in their state."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return mean_traffic(rows, context.hidden_size)


@register_mixer("aft_simple", AFTSimpleConfig)
class AFTSimple(TensorStateMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj [D, D]."""

    config: AFTSimpleConfig

    def __init__(self, config: AFTSimpleConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D = context.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        zeros_D = x_BTD.new_zeros(x_BTD.shape[-1])
        y_BTD = read_weighted_mean(self.k_proj(x_BTD), self.v_proj(x_BTD), zeros_D, zeros_D, seq, state)
        return self.o_proj(self.q_proj(x_BTD).sigmoid() * y_BTD.to(x_BTD.dtype)), {}

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
