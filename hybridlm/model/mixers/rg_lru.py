"""The recurrent block of Griffin: a gated linear recurrence beside a GELU branch.

    y = gelu(W_y x);   u = conv(W_x x);   r, i = sigmoid(block-diagonal(u) + b)
    a = exp(-8 r softplus(Lambda));   h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t;   out = W_o (h * y)

The first token of a document enters with factor 1. Source: De et al. 2024 (Griffin), section 2.4 and appendix A;
Botev et al. 2024 (RecurrentGemma).

B rows, T tokens, D hidden size, C channels of the recurrence, H blocks of the gates, K = C / H channels per block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps, check_taps_in_shards, conv_traffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.scan import FP32_BYTES, scan_tokens, scan_traffic
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes, size_of
from hybridlm.model.parameter_roles import CONVOLUTION, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo

DECAY_STRENGTH = 8.0  # c of the paper
DECAY_INIT = (0.9, 0.999)  # exp(-softplus(Lambda)) at the start, uniform in its square
INIT_SCALE = 0.01  # variance of the gates' and the convolution's weights, times their number of inputs
MIN_SQUARE = 2.5e-7  # below it the slope of the square root stays 1000
GATES = ("input", "recurrence")


@dataclass(kw_only=True)
class RGLRUConfig(MixerConfig):
    """Configuration of Griffin's recurrent block.

    Args:
        num_heads: blocks H of the block-diagonal gates.
        width: channels C of the recurrence; null is the hidden size.
        conv_size: taps of the convolution, which has a bias and no activation.
        bias: whether the three projections have a bias.

    Raises:
        ConfigError: a size that is not positive, or a width that is no multiple of the blocks.
    """

    kind: str = "rg_lru"
    num_heads: int
    width: int | None = None
    conv_size: int = 4
    bias: bool = True
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("num_heads", "width"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        check_taps(self.conv_size)

    def channels(self, context: LayerContext) -> int:
        """Channels C of the recurrence.

        Raises:
            ConfigError: they are no multiple of the blocks of the gates.
        """
        width = context.hidden_size if self.width is None else self.width
        require(width % self.num_heads == 0, "num_heads", "must divide the width of the recurrence",
                got=self.num_heads, expected=f"a divisor of {width}")
        return width

    def _weights(self, context: LayerContext) -> int:
        C = self.channels(context)
        return 3 * context.hidden_size * C + 2 * C * C // self.num_heads

    def num_params(self, context: LayerContext) -> int:
        C = self.channels(context)
        biases = 2 * C + context.hidden_size if self.bias else 0
        return self._weights(context) + C * (self.conv_size + 1) + 3 * C + biases

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        C = self.channels(context)
        return {"projections": 2.0 * self._weights(context), "conv": 2.0 * self.conv_size * C, "recurrence": 5.0 * C}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of h in fp32 and of the inputs of the convolution in the dtype of the model."""
        return self.channels(context) * (FP32_BYTES + element_bytes * (self.conv_size - 1))

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: both branches, and gates, factors and states in fp32."""
        C = self.channels(context)
        return element_bytes * (context.hidden_size + 5 * C) + FP32_BYTES * 11 * C

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_taps_in_shards(self.conv_size, length)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        C = self.channels(context)
        return [*conv_traffic(rows, self.conv_size, C, element_bytes), scan_traffic(rows, C)]

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Blocks as many as heads of the nearest mixer, or fewer, so that they divide the width."""
        width = size_of(options, "width", model.hidden_size)
        return {"num_heads": math.gcd(model.heads_for(cls).num_heads, width)}


@register_mixer("rg_lru", RGLRUConfig)
class RGLRU(TensorStateMixer):
    """Parameters: x_proj, y_proj [C, D], conv, input_gate and recurrence_gate [H, K, K] with biases [C], Lambda [C],
    out_proj [D, C].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("Lambda", "input_bias", "recurrence_bias")
    config: RGLRUConfig

    def __init__(self, config: RGLRUConfig, context: LayerContext):
        super().__init__()
        self.config = config
        C, K = config.channels(context), config.channels(context) // config.num_heads
        self.x_proj = nn.Linear(context.hidden_size, C, bias=config.bias)
        self.y_proj = nn.Linear(context.hidden_size, C, bias=config.bias)
        self.conv = CausalConv(C, config.conv_size, activation=None)
        for name in GATES:
            setattr(self, f"{name}_gate", nn.Parameter(torch.zeros(config.num_heads, K, K)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(C)))
        self.Lambda = nn.Parameter(torch.zeros(C))
        self.out_proj = nn.Linear(C, context.hidden_size, bias=config.bias)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        y_BTC = F.gelu(self.y_proj(x_BTD), approximate="tanh")
        u_BTC = self.conv(self.x_proj(x_BTD), seq, state)
        wide = torch.promote_types(u_BTC.dtype, torch.float32)
        u_BTHK = u_BTC.unflatten(-1, (self.config.num_heads, -1))
        i_BTC, r_BTC = (torch.einsum("bthk,hkj->bthj", u_BTHK, getattr(self, f"{name}_gate").to(u_BTHK.dtype))
                        .flatten(-2).to(wide).add(getattr(self, f"{name}_bias")).sigmoid() for name in GATES)
        log_a_BTC = -DECAY_STRENGTH * r_BTC * F.softplus(self.Lambda)
        first_BT1 = (seq.positions_BT == 0)[..., None]
        gain_BTC = torch.where(first_BT1, 1.0, bounded_sqrt(-torch.expm1(2.0 * log_a_BTC)))
        h_BTC = scan_tokens(gain_BTC * i_BTC * u_BTC, log_a_BTC.exp(), seq, state)
        return self.out_proj(h_BTC.to(y_BTC.dtype) * y_BTC), {}

    def parameter_roles(self) -> dict[str, ParameterRole]:
        blocks = {f"{name}_gate": ParameterRole("expert_stack") for name in GATES}
        return find_roles(self, blocks | {"conv.weight": CONVOLUTION})

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """exp(-softplus(Lambda))^2 is uniform in 0.9^2 .. 0.999^2; gates and taps have variance 0.01 over inputs."""
        init_projections(self, std)
        nn.init.normal_(self.conv.weight, std=math.sqrt(INIT_SCALE / self.config.conv_size))
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)
        for name in GATES:
            gate = getattr(self, f"{name}_gate")
            nn.init.normal_(gate, std=math.sqrt(INIT_SCALE / gate.shape[1]))
            nn.init.zeros_(getattr(self, f"{name}_bias"))
        square = self.Lambda.uniform_(*(decay**2 for decay in DECAY_INIT))
        self.Lambda.copy_(torch.log(torch.expm1(-0.5 * square.log())))


def bounded_sqrt(x: Tensor) -> Tensor:
    """Square root whose slope is at most 1000, also at zero.

    Source: the published code of Griffin bounds the gradient so.

    >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
    >>> torch.autograd.grad(bounded_sqrt(x).sum(), x)[0]
    tensor([1.0000e+03, 2.5000e-01])
    """
    slope = 0.5 * torch.rsqrt(x.detach().clamp(min=MIN_SQUARE))
    return x.detach().sqrt() + (x - x.detach()) * slope
