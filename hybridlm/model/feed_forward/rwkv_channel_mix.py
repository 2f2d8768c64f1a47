"""Channel mix of RWKV: a squared ReLU on the token mixed with the one before it.

    y = W_v relu(W_k x_k)^2,   times sigmoid(W_r x_r) up to RWKV-6

Sources: Peng et al. 2023 (RWKV-4), section 3.1.2; Peng et al. 2024 (Eagle and Finch); Peng et al. 2025 (RWKV-7).
B rows, T tokens, D hidden size, I inner width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.feed_forward.contract import FeedForward, FeedForwardConfig, register_feed_forward
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.rwkv import channel_ramp, depth_ratio
from hybridlm.model.mixers.common.token_shift import lerp_with_previous, previous_tokens
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class RWKVChannelMixConfig(FeedForwardConfig):
    """Configuration of RWKV's channel mix.

    Args:
        intermediate_size: inner width I; RWKV-4 and 7 have four times the hidden size, RWKV-5 and 6 seven halves of it.
        receptance: whether the output is gated by the token mixed with the one before it (up to RWKV-6).

    Raises:
        ConfigError: a width that is not positive.
    """

    kind: str = "rwkv_channel_mix"
    intermediate_size: int
    receptance: bool = False
    keeps_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.intermediate_size > 0, "intermediate_size", "must be positive", got=self.intermediate_size)

    def _matrix_params(self, context: LayerContext) -> int:
        return context.hidden_size * (2 * self.intermediate_size + context.hidden_size * self.receptance)

    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        return self._matrix_params(context) + context.hidden_size * (1 + self.receptance)

    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        return {"channel mix": 2.0 * self._matrix_params(context)}

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the mixed inputs, and the inner tensors around the square."""
        mixed = 1 + (4 if self.receptance else 2)
        return element_bytes * (mixed * context.hidden_size + 3 * self.intermediate_size)

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the last token."""
        return element_bytes * context.hidden_size

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: each shard needs the token before it."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        tail = rows * element_bytes * context.hidden_size
        return [ShardTraffic("from_previous", tail, tail)]


@register_feed_forward("rwkv_channel_mix", RWKVChannelMixConfig)
class RWKVChannelMix(FeedForward):
    """Parameters: key_proj [I, D], value_proj [D, I], mix_k [D]; with receptance r_proj [D, D] and mix_r [D]."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("mix_k", "mix_r")

    def __init__(self, config: RWKVChannelMixConfig, context: LayerContext):
        super().__init__()
        D = context.hidden_size
        self.receptance = config.receptance
        self.remaining_depth = depth_ratio(context)[1]
        self.key_proj = nn.Linear(D, config.intermediate_size, bias=False)
        self.value_proj = nn.Linear(config.intermediate_size, D, bias=False)
        self.mix_k = nn.Parameter(torch.zeros(D))
        if config.receptance:
            self.r_proj = nn.Linear(D, D, bias=False)
            self.mix_r = nn.Parameter(torch.zeros(D))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        before_BTD = previous_tokens(x_BTD, seq, state)
        k_BTI = self.key_proj(lerp_with_previous(x_BTD, before_BTD, self.mix_k).to(x_BTD.dtype))
        y_BTD = self.value_proj(F.relu(k_BTI).square())
        if self.receptance:
            y_BTD = self.r_proj(lerp_with_previous(x_BTD, before_BTD, self.mix_r).to(x_BTD.dtype)).sigmoid() * y_BTD
        return y_BTD, {}

    def new_state(self, batch: int, max_length: int) -> TensorState:
        return TensorState()

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Mixes are ramps over channels and layers, steeper without receptance (RWKV-LM, x052, x060 and x070)."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=std)
        power = self.remaining_depth if self.receptance else self.remaining_depth**4
        start_D = 1.0 - channel_ramp(self.mix_k.shape[0]) ** power
        self.mix_k.copy_(start_D)
        if self.receptance:
            self.mix_r.copy_(start_D)
