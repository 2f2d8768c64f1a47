"""RWKV-4: a mean of past values, weighted by exponentials of their keys, with one decay per channel.

    y_t = (sum_{s<t} e^{(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same with v = 1),   w = -exp(decay)
    out = W_o (sigmoid(r) * y)

r, k and v are projections of the token mixed with the one before it.
Source: Peng et al. 2023, RWKV, section 3.1.

B rows, T tokens, D hidden size and channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.log_sum import FP32_BYTES, mean_traffic, read_weighted_mean
from hybridlm.model.mixers.common.rwkv import channel_ramp, depth_ratio, zigzag
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.common.token_shift import lerp_with_previous, previous_tokens
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class RWKV4Config(MixerConfig):
    """Configuration of the time mix of RWKV-4, which has no options: it has as many channels as the model has dims."""

    kind: str = "rwkv4"
    is_linear: ClassVar[bool] = True

    def num_params(self, context: LayerContext) -> int:
        return 4 * context.hidden_size**2 + 5 * context.hidden_size

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it: two sums that decay, are added to and are read."""
        return {"projections": 8.0 * context.hidden_size**2, "recurrence": 9.0 * context.hidden_size}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of both sums and the maximum in fp32, and of the last token."""
        return context.hidden_size * (3 * FP32_BYTES + element_bytes)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: mixed inputs and projections, and the recurrence in fp32."""
        return context.hidden_size * (10.0 * element_bytes + 22.0 * FP32_BYTES)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: divided by a common maximum, both sums are linear in their state."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        tail = rows * context.hidden_size * element_bytes
        return [ShardTraffic("from_previous", tail, tail), *mean_traffic(rows, context.hidden_size)]


@register_mixer("rwkv4", RWKV4Config)
class RWKV4(TensorStateMixer):
    """Parameters: r_proj, k_proj, v_proj, o_proj [D, D], decay and bonus [D], mix [3, D] for k, v and r."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("decay", "bonus", "mix")
    config: RWKV4Config

    def __init__(self, config: RWKV4Config, context: LayerContext):
        super().__init__()
        self.config = config
        self.ratios = depth_ratio(context)
        D = context.hidden_size
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.decay, self.bonus = (nn.Parameter(torch.zeros(D)) for _ in range(2))
        self.mix = nn.Parameter(torch.zeros(3, D))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        before_BTD = previous_tokens(x_BTD, seq, state)
        k_BTD, v_BTD, r_BTD = (proj(lerp_with_previous(x_BTD, before_BTD, mix).to(x_BTD.dtype)) for proj, mix in
                               zip((self.k_proj, self.v_proj, self.r_proj), self.mix, strict=True))
        y_BTD = read_weighted_mean(k_BTD, v_BTD, -self.decay.exp(), self.bonus, seq, state)
        return self.o_proj(r_BTD.sigmoid() * y_BTD.to(x_BTD.dtype)), {}

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"mix": VECTOR})

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Ramps over channels and layers, as in the authors' code (RWKV-LM, RWKV-v4neo)."""
        init_projections(self, std)
        D, (r01, r10) = len(self.decay), self.ratios
        position = torch.arange(D, dtype=torch.float32) / max(D - 1, 1)
        self.decay.copy_(-5.0 + 8.0 * position ** (0.7 + 1.3 * r01))
        self.bonus.copy_(math.log(0.3) + 5.0 * zigzag(D))
        ramp_D = channel_ramp(D)
        keys = 1.0 - ramp_D**r10
        self.mix.copy_(torch.stack([keys, keys - 0.3 * r01, 1.0 - ramp_D ** (0.5 * r10)]))
