"""Gated short convolution: the mixer of LFM2, between two gates that read the token alone.

    B, C, u = W_in x;   y = W_out (C * conv(B * u))

Source: Liquid AI 2025 (LFM2), section 2; as in the class Lfm2ShortConv of transformers.

B rows, T tokens, D hidden size, W taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps, check_taps_in_shards, conv_traffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class GatedConvConfig(MixerConfig):
    """Configuration of the gated short convolution.

    Args:
        conv_size: taps W of the convolution, which has no activation. A token sees W - 1 earlier ones.
        bias: whether the projections and the convolution have biases.

    Raises:
        ConfigError: fewer than two taps.
    """

    kind: str = "gated_conv"
    conv_size: int = 3
    bias: bool = False
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_taps(self.conv_size)

    def num_params(self, context: LayerContext) -> int:
        D = context.hidden_size
        return 4 * D * D + D * self.conv_size + (5 * D if self.bias else 0)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        D = context.hidden_size
        return {"projections": 8.0 * D * D, "conv": 2.0 * self.conv_size * D, "gates": 2.0 * D}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the last inputs of the convolution in the dtype of the model."""
        return context.hidden_size * (self.conv_size - 1) * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the input, the projections, and both sides of the convolution."""
        return 7.0 * element_bytes * context.hidden_size

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_taps_in_shards(self.conv_size, length)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return conv_traffic(rows, self.conv_size, context.hidden_size, element_bytes)


@register_mixer("gated_conv", GatedConvConfig)
class GatedConv(TensorStateMixer):
    """Parameters: in_proj [3 D, D] (gate B, gate C, values), conv, out_proj [D, D]."""

    config: GatedConvConfig

    def __init__(self, config: GatedConvConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D = context.hidden_size
        self.in_proj = nn.Linear(D, 3 * D, bias=config.bias)
        self.conv = CausalConv(D, config.conv_size, bias=config.bias, activation=None)
        self.out_proj = nn.Linear(D, D, bias=config.bias)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        before_BTD, after_BTD, u_BTD = self.in_proj(x_BTD).chunk(3, -1)
        return self.out_proj(after_BTD * self.conv(before_BTD * u_BTD, seq, state)), {}

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
        self.conv.reset_parameters()
