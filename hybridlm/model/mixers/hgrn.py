"""HGRN: a gated linear recurrence whose forget gates are bounded from below, the higher the layer the more.

    real       f = b + (1 - b) sigmoid(W_f x);   h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t)
    complex    h_t = f_t e^{i theta} h_{t-1} + (1 - f_t) (silu(W_re x_t) + i silu(W_im x_t))
    out = W_o (RMSNorm(h) * silu(W_g x));        complex: h is Re h beside Im h

b is one cumulative softmax over layers, 0 in the first. Source: Qin et al. 2023 (HGRN), section 3.

B rows, T tokens, D hidden size, C channels, E numbers per channel: 1, or 2 where they are complex.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.lower_bound import BoundedConfig, BoundedMixer
from hybridlm.model.mixers.common.scan import FP32_BYTES, scan_tokens, scan_traffic
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.norm import GatedRMSNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class HGRNConfig(BoundedConfig):
    """Configuration of HGRN.

    Args:
        width: channels C; null is the hidden size.
        state: real, or complex, whose phases turn by theta per token.
        lower_bound: whether the forget gates have lower bounds.
        norm_eps: of the output norm; null takes the model's.

    Raises:
        ConfigError: a width that is not positive.
    """

    kind: str = "hgrn"
    width: int | None = None
    state: Literal["real", "complex"] = "real"
    norm_eps: float | None = None
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("width", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)

    @property
    def numbers(self) -> int:
        """Numbers E per channel."""
        return 2 if self.state == "complex" else 1

    def gate_channels(self, context: LayerContext) -> int:
        return context.hidden_size if self.width is None else self.width

    def _weights(self, context: LayerContext) -> int:
        return context.hidden_size * self.gate_channels(context) * (1 + 3 * self.numbers)

    def num_params(self, context: LayerContext) -> int:
        vectors = self.numbers + (self.numbers - 1)  # norm, and theta
        return self._weights(context) + self.gate_channels(context) * (vectors + self.bounds_owned(context))

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        per_channel = 4.0 if self.state == "real" else 12.0
        return {"projections": 2.0 * self._weights(context), "recurrence": per_channel * self.gate_channels(context)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of h in fp32."""
        return FP32_BYTES * self.numbers * self.gate_channels(context)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the projections, and gates, inputs and states in fp32."""
        C, E = self.gate_channels(context), self.numbers
        return element_bytes * (context.hidden_size + (1 + 4 * E) * C) + FP32_BYTES * (3 + 5 * E) * C

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: the recurrence is linear in its state."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return [scan_traffic(rows, self.numbers * self.gate_channels(context))]


@register_mixer("hgrn", HGRNConfig)
class HGRN(BoundedMixer):
    """Parameters: f_proj [C, D], i_proj and g_proj [E C, D], o_proj [D, E C], o_norm [E C]; theta [C] where the state
    is complex; lower_bounds [L, C] in the first layer.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("lower_bounds", "theta", "o_norm.weight")
    config: HGRNConfig

    def __init__(self, config: HGRNConfig, context: LayerContext):
        super().__init__(config, context)
        self.config = config
        D, C = context.hidden_size, config.gate_channels(context)
        self.f_proj = nn.Linear(D, C, bias=False)
        self.i_proj = nn.Linear(D, config.numbers * C, bias=False)
        self.g_proj = nn.Linear(D, config.numbers * C, bias=False)
        self.theta = nn.Parameter(torch.zeros(C)) if config.state == "complex" else None
        self.o_norm = GatedRMSNorm(config.numbers * C, context.norm.eps_or(config.norm_eps),
                                   "silu")
        self.o_proj = nn.Linear(config.numbers * C, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        f_BTC, input_BTX = wide(self.f_proj(x_BTD)), F.silu(wide(self.i_proj(x_BTD)))
        bound_C = self.read_lower_bound(seq)
        write_BTC = (-f_BTC).sigmoid()
        keep_BTC = f_BTC.sigmoid()
        if bound_C is not None:
            write_BTC = (1.0 - bound_C) * write_BTC
            keep_BTC = bound_C + (1.0 - bound_C) * keep_BTC
        if self.theta is None:
            h_BTX = scan_tokens(write_BTC * input_BTX, keep_BTC, seq, state)
        else:
            real_BTC, imaginary_BTC = input_BTX.chunk(2, -1)
            h_BTC = scan_tokens(torch.complex(write_BTC * real_BTC, write_BTC * imaginary_BTC),
                                torch.polar(keep_BTC, wide(self.theta).expand_as(keep_BTC)), seq, state)
            h_BTX = torch.cat([h_BTC.real, h_BTC.imag], -1)
        return self.o_proj(self.o_norm(h_BTX.to(x_BTD.dtype), self.g_proj(x_BTD))), {}

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"lower_bounds": VECTOR})

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Bounds grow evenly from layer to layer; phases are those of rotary position embedding (HGRN, section 3.2)."""
        init_projections(self, std)
        if self.lower_bounds is not None:
            nn.init.zeros_(self.lower_bounds)
        if self.theta is not None:
            C = self.theta.shape[0]
            self.theta.copy_(10000.0 ** (-2.0 * torch.arange(C) / C))
