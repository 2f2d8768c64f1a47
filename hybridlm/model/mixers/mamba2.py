"""Mamba-2: linear attention with one decay per head inside a gated block, as Mamba has it.

    z, x, B, C, dt = W_in u;   x, B, C = silu(conv(x, B, C));   dt = clamp(softplus(dt + dt_bias))
    S_t = exp(-dt_t e^{A_log}) S_{t-1} + dt_t B_t x_t^T;   y_t = S_t^T C_t + D x_t
    out = W_out norm(y * silu(z))

B and C are the keys and queries of a group of heads, x its values. With `levels` blocks of the past are read with
scales of their own (log-linear attention), lambda = softplus(level_scale * u) with one more part u of W_in.
Sources: Dao and Gu 2024 (Mamba-2, section 7), Waleffe et al. 2024 and Nemotron-H 2025, Zuo et al. 2025 (Falcon-H1),
Guo et al. 2025 (log-linear attention).

B rows, T tokens, D hidden size, I inner channels, H heads, P dims per head, G groups, N states per channel, C channels
of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.attention_weights import spread_over_heads, take_attention_projections
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps, check_taps_in_shards, conv_traffic
from hybridlm.model.mixers.common.expanded_heads import expanded_heads
from hybridlm.model.mixers.common.init import (
    init_identity_conv,
    init_inverse_softplus,
    init_log_uniform,
    init_projections,
)
from hybridlm.model.mixers.common.levels import (
    check_levels,
    compute_level_scales,
    count_calls,
    count_states,
    level_activations,
    level_flops,
    refuse_split_rows,
    run_levels,
)
from hybridlm.model.mixers.common.matrix_state import matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.memory import MEMORY
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.mixers.sizing import HeadSizes, ModelSizes
from hybridlm.model.norm import GateFirstRMSNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind

FP32_BYTES = 4  # bytes per element
CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations
DT_INIT = (1e-3, 1e-1)  # step sizes at the start are log-uniform between these


@dataclass(kw_only=True)
class Mamba2Config(StateHeadsConfig):
    """Configuration of Mamba-2.

    Args:
        num_heads: heads H, a multiple of the groups; the inner channels are I = H P.
        head_dim: dims P of a head.
        state_size: states N per channel.
        num_groups: groups G of heads that share B and C.
        conv_size: taps of the convolution over x, B and C, which SiLU follows.
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out_proj have a bias.
        norm: gated, RMSNorm(y * silu(z)) over the channels of each group, or none, y * silu(z) (Falcon-H1).
        norm_eps: null takes the model's.
        dt_min: smallest step.
        dt_max: largest step; null has none.
        skip: D is one number per head, or per channel.
        a_init: A starts uniform in this range.
        levels: levels L of log-linear attention; null reads one state.
        input_scales: factors of z, x, B, C and dt as they are projected (Falcon-H1); null has none.

    Raises:
        ConfigError: a size that is not positive, groups that do not divide the heads, or other than five factors.
    """

    kind: str = "mamba2"
    num_heads: int
    head_dim: int
    state_size: int = 128
    num_groups: int = 1
    conv_size: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm: Literal["gated", "none"] = "gated"
    norm_eps: float | None = None
    dt_min: float = 0.0
    dt_max: float | None = None
    skip: Literal["head", "channel"] = "head"
    a_init: tuple[float, float] = (1.0, 16.0)
    levels: int | None = None
    input_scales: list[float] | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "state_size", "num_groups", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        check_taps(self.conv_size)
        check_levels(self.levels)
        require(self.num_heads % self.num_groups == 0, "num_groups", "must divide num_heads", got=self.num_groups,
                expected=f"a divisor of {self.num_heads}")
        require(self.dt_min >= 0, "dt_min", "must not be negative", got=self.dt_min)
        require(self.dt_max is None or self.dt_max > self.dt_min, "dt_max", "must be above dt_min", got=self.dt_max,
                expected=f"null, or more than {self.dt_min}")
        require(self.input_scales is None or len(self.input_scales) == 5, "input_scales", "must be five factors",
                got=self.input_scales, expected="one for each of z, x, B, C and dt, or null")
        low, high = self.a_init
        require(0 < low <= high, "a_init", "must be a positive range", got=[low, high], expected="[low, high]")

    @property
    def inner_size(self) -> int:
        """Inner channels I."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def level_width(self) -> int:
        """Outputs of in_proj that scale the levels."""
        return self.num_heads * (self.levels or 0)

    def _projection_params(self, context: LayerContext) -> int:
        return context.hidden_size * (2 * self.inner_size + self.conv_channels + self.num_heads + self.level_width)

    def num_params(self, context: LayerContext) -> int:
        inner = self.inner_size
        vectors = 2 * self.num_heads + (self.num_heads if self.skip == "head" else inner)
        vectors += self.level_width + (inner if self.norm == "gated" else 0)
        outputs = inner + self.conv_channels + self.num_heads + self.level_width
        biases = outputs + context.hidden_size if self.bias else 0
        conv = self.conv_channels * (self.conv_size + self.conv_bias)
        return self._projection_params(context) + conv + vectors + biases

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it: decay, write and read of every state."""
        return {"projections": 2.0 * self._projection_params(context),
                "conv": 2.0 * self.conv_size * self.conv_channels,
                "recurrence": (5.0 + level_flops(self.levels)) * self.inner_size * self.state_size}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the states in fp32 and of the inputs of the convolution in the dtype of the model."""
        taps = element_bytes * self.conv_channels * (self.conv_size - 1)
        return FP32_BYTES * count_states(self.levels) * self.inner_size * self.state_size + taps

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: inner tensors, and the chunked operation and the norm in fp32."""
        inner, conv = self.inner_size, self.conv_channels
        chunk = self.num_heads * (self.state_size * self.head_dim / CHUNK_TOKENS + 2 * CHUNK_TOKENS)
        norm = 3 * inner if self.norm == "gated" else inner
        calls = count_calls(self.levels, context.max_position)
        return (element_bytes * (context.hidden_size + 4 * inner + 2 * conv)
                + FP32_BYTES * (calls * (2 * conv + 4 * self.num_heads + chunk) + norm
                                + level_activations(self.levels, self.num_heads)))

    def check_context_parallel(self, shards: int, length: int) -> None:
        if self.levels is not None:
            refuse_split_rows(self.kind)
        check_taps_in_shards(self.conv_size, length)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """Bytes of the inputs of the convolution, and in fp32 of the states of each shard and their decays."""
        return [*conv_traffic(rows, self.conv_size, self.conv_channels, element_bytes),
                matrix_traffic(rows, self.num_heads, self.state_size, self.head_dim, self.num_heads)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        data.pop("a_init")  # it says how weights start
        return data if self.norm == "gated" else {key: value for key, value in data.items() if key != "norm_eps"}

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        return (MEMORY,)

    def shared_width(self, kind: SharedKind, context: LayerContext) -> int:
        return self.inner_size

    def head_sizes(self) -> HeadSizes | None:
        return None  # heads of a block of twice the width are no measure for other mixers

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        return expanded_heads(options, model, cls)

    attention_weights: ClassVar[tuple[str, ...]] = ("in_proj.weight", "out_proj.weight")

    def adapted_to(self, old: MixerConfig) -> Self:
        """The same block with the heads of `old`: a group per head, whose states are the dims of a key (Llamba)."""
        heads = old.projection_heads()
        if not {"q_proj", "v_proj", "o_proj"} <= set(heads):
            return self
        count, value_dim = heads["o_proj"]
        return replace(self, num_heads=count, num_groups=count, head_dim=value_dim, state_size=heads["q_proj"][1])

    def initial_weights_from(self, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig) -> dict[str, Tensor]:
        """Take v as x, k as B and q as C (MOHAWK, section 3); the gate, the steps and the levels start fresh."""
        keys, values = (self.num_groups, self.state_size), (self.num_heads, self.head_dim)
        found = take_attention_projections(old, tensors, {"q_proj": keys, "k_proj": keys, "v_proj": values}, norm)
        if len(found) < 4:
            return {}
        q, k, v, o = (found[f"{name}_proj.weight"] for name in "qkvo")
        gate, steps = (torch.full((rows, v.shape[1]), torch.nan, dtype=v.dtype, device=v.device)
                       for rows in (self.inner_size, self.num_heads + self.level_width))
        return {"in_proj.weight": torch.cat([gate, v, k, q, steps]), "out_proj.weight": o}


@register_mixer("mamba2", Mamba2Config)
class Mamba2(TensorStateMixer):
    """Parameters: in_proj [2 I + 2 G N + H, D] (z, x, B, C, dt), conv, A_log and dt_bias [H], D [H] or [H, P], norm
    [I] and out_proj [D, I]. `levels` adds H L rows to in_proj, and level_scale [H L].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias", "norm.weight", "level_scale")
    config: Mamba2Config

    def __init__(self, config: Mamba2Config, context: LayerContext):
        super().__init__()
        self.config = config
        self.layer_index, self.memory_is_read = context.layer_index, context.is_read(MEMORY)
        inner, heads = config.inner_size, config.num_heads
        outputs = inner + config.conv_channels + heads + config.level_width
        self.in_proj = nn.Linear(context.hidden_size, outputs, bias=config.bias)
        self.conv = CausalConv(config.conv_channels, config.conv_size, bias=config.conv_bias)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.zeros(heads) if config.skip == "head" else torch.zeros(heads, config.head_dim))
        if config.levels is not None:
            self.level_scale = nn.Parameter(torch.zeros(config.level_width))
        self.norm = None
        if config.norm == "gated":
            eps = context.norm.eps_or(config.norm_eps)
            self.norm = GateFirstRMSNorm(inner, config.num_groups, eps)
        self.out_proj = nn.Linear(inner, context.hidden_size, bias=config.bias)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        inner, keys = config.inner_size, config.num_groups * config.state_size
        widths = (inner, config.conv_channels, config.num_heads, config.level_width)
        z_BTI, xBC_BTC, dt_BTH, u_BTX = self._projected(x_BTD).split(widths, -1)
        x_BTI, B_BTX, C_BTX = self.conv(xBC_BTC.contiguous(), seq, state).split((inner, keys, keys), -1)
        wide = torch.promote_types(dt_BTH.dtype, torch.float32)
        dt_BTH = F.softplus(dt_BTH.to(wide) + self.dt_bias)
        if config.dt_min > 0 or config.dt_max is not None:
            dt_BTH = dt_BTH.clamp(config.dt_min, config.dt_max)
        x_BTHP = x_BTI.unflatten(-1, (config.num_heads, config.head_dim))
        B_BTGN, C_BTGN = (y.unflatten(-1, (config.num_groups, config.state_size)) for y in (B_BTX, C_BTX))
        v_BTHP = (x_BTHP * dt_BTH[..., None]).to(x_BTHP.dtype)
        g_BTH = -dt_BTH * self.A_log.to(wide).exp()
        if config.levels is None:
            y_BTHP = scan_matrix_state(C_BTGN, B_BTGN, v_BTHP, g_BTH, seq, state)
        else:
            start = None if state is None else state.tensors.get("levels")
            scales_BTHL = compute_level_scales(u_BTX, self.level_scale, config.num_heads)
            y_BTHP, levels = run_levels(C_BTGN, B_BTGN, v_BTHP, scales_BTHL, seq, start, decodes=state is not None,
                                        g=g_BTH, scale=1.0)
            if state is not None:
                state.tensors["levels"] = levels
        D_HX = self.D[:, None] if config.skip == "head" else self.D
        y_BTI = (y_BTHP + D_HX * x_BTHP).to(x_BTI.dtype).flatten(-2)
        if self.memory_is_read:
            seq.leave(MEMORY, self.layer_index, y_BTI)
        y_BTI = y_BTI * F.silu(z_BTI) if self.norm is None else self.norm(y_BTI, z_BTI)
        return self.out_proj(y_BTI), {}

    def _projected(self, x_BTD: Tensor) -> Tensor:
        """z, x, B, C, dt and the scales of levels, one behind the other, times `input_scales`."""
        y_BTX = self.in_proj(x_BTD)
        if self.config.input_scales is None:
            return y_BTX
        inner, keys = self.config.inner_size, self.config.num_groups * self.config.state_size
        widths = (inner, inner, keys, keys, self.config.num_heads, self.config.level_width)
        parts = y_BTX.split(widths, -1)
        return torch.cat([part * scale for part, scale in zip(parts, (*self.config.input_scales, 1.0), strict=True)],
                         -1)

    def output_projection(self) -> tuple[nn.Linear, int]:
        return self.out_proj, self.config.num_heads

    @torch.no_grad()
    def calibrate(self, half_life_H: Tensor) -> None:
        """The convolution becomes the identity and the decay a constant per head; the gate of silu stays random."""
        init_identity_conv(self.conv.weight)
        if self.conv.bias is not None:
            self.conv.bias.zero_()
        before = self.config.inner_size + self.config.conv_channels
        for parameter in self.in_proj.parameters():
            parameter[before : before + self.config.num_heads].zero_()  # the part of the steps that follows the token
        self.A_log.zero_()
        rate_H = math.log(2) / spread_over_heads(half_life_H.double(), self.config.num_heads)
        self.dt_bias.copy_(torch.log(torch.expm1(rate_H)))

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"D": VECTOR})

    @property
    def decodes_padded_rows(self) -> bool:
        return self.config.levels is None  # blocks of rows of unlike lengths end apart

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """A is uniform in `a_init`, D is 1, steps start log-uniform, as in the authors' code (mamba_ssm, Mamba2)."""
        init_projections(self, std)
        self.conv.reset_parameters()
        init_log_uniform(self.A_log, *self.config.a_init)
        init_inverse_softplus(self.dt_bias, *DT_INIT)
        nn.init.ones_(self.D)
        if self.config.levels is not None:
            nn.init.ones_(self.level_scale)
