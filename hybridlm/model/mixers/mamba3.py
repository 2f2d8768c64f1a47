"""Mamba-3 with one input and one output: Mamba-2 with a trapezoidal step, states that turn, and no convolution.

    z, x, B, C, dt, A, lambda, theta = W_in u;   dt = softplus(dt + dt_bias);   A = -softplus(A), at most -1e-4
    a = e^{dt A};   lambda = sigmoid(lambda);    phi_t = phi_{t-1} + pi tanh(theta_t) dt_t
    k = turn(RMSNorm(B) + B_bias, phi),          q = turn(RMSNorm(C) + C_bias, phi)
    S_t = a_t S_{t-1} + (1 - lambda_t) dt_t a_t k_{t-1} x_{t-1}^T + lambda_t dt_t k_t x_t^T
    y_t = S_t^T q_t + D x_t;   out = W_out (y * silu(z))

What tokens before t wrote is P_t = a_t (P_{t-1} + c_t k_{t-1} x_{t-1}^T) with c_t = lambda_{t-1} dt_{t-1} +
(1 - lambda_t) dt_t: linear attention on the keys and values of the token before. The token's own write is one product.
Source: Lahoti et al. 2026 (Mamba-3), and the authors' code (mamba_ssm, mamba3.py, as first published).

B rows, T tokens, D hidden size, I inner channels, H heads, P dims per head, G groups, N states per channel, R turned
pairs of states.
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
from hybridlm.model.mixers.common.expanded_heads import expanded_heads
from hybridlm.model.mixers.common.init import init_inverse_softplus, init_projections
from hybridlm.model.mixers.common.matrix_state import FP32_BYTES, matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.phase import accumulate_phase
from hybridlm.model.mixers.common.scan import scan_traffic
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.common.token_shift import previous_tokens
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.mixers.sizing import HeadSizes, ModelSizes
from hybridlm.model.norm import HeadRMSNorm, RMSNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide

CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations
DT_INIT = (1e-3, 1e-1)  # step sizes at the start are log-uniform between these
LARGEST_RATE = -1e-4  # of A


@dataclass(kw_only=True)
class Mamba3Config(StateHeadsConfig):
    """Configuration of Mamba-3 with one input and one output per head (SISO).

    Args:
        num_heads: heads H, a multiple of the groups; the inner channels are I = H P.
        head_dim: dims P of a head.
        state_size: states N per channel.
        num_groups: groups G of heads that share B and C, but for their biases.
        rope_fraction: share of the states that turn.
        norm: whether y is normalised over each head before its gate (RMSNorm).
        norm_eps: of all norms; null takes the model's.

    Raises:
        ConfigError: a size that is not positive, groups that do not divide the heads, or no pair of states that turns.
    """

    kind: str = "mamba3"
    num_heads: int
    head_dim: int
    state_size: int = 128
    num_groups: int = 1
    rope_fraction: float = 0.5
    norm: bool = False
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "state_size", "num_groups", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        require(self.num_heads % self.num_groups == 0, "num_groups", "must divide num_heads", got=self.num_groups,
                expected=f"a divisor of {self.num_heads}")
        require(self.rope_fraction <= 1 and self.pairs > 0, "rope_fraction", "must turn a pair of states or more",
                got=self.rope_fraction, expected=f"from {2 / self.state_size:.3g} to 1")

    @property
    def inner_size(self) -> int:
        """Inner channels I."""
        return self.num_heads * self.head_dim

    @property
    def pairs(self) -> int:
        """Pairs R of states that turn."""
        return int(self.state_size * self.rope_fraction) // 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of in_proj: z, x, B, C, dt, A, lambda and theta."""
        inner, keys, H = self.inner_size, self.num_groups * self.state_size, self.num_heads
        return inner, inner, keys, keys, H, H, H, self.pairs

    def _weights(self, context: LayerContext) -> int:
        return context.hidden_size * (sum(self.widths) + self.inner_size)

    def num_params(self, context: LayerContext) -> int:
        biases = 2 * self.num_heads * self.state_size
        return self._weights(context) + biases + 2 * self.state_size + 2 * self.num_heads + self.norm * self.inner_size

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Decay, write and read of every state; turning keys and queries, and the token's own write."""
        turning = self.num_heads * (26.0 * self.pairs + 4.0 * self.state_size)
        return {"projections": 2.0 * self._weights(context),
                "recurrence": 5.0 * self.inner_size * self.state_size + turning + 3.0 * self.inner_size}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of states, phases and the last token's write factor in fp32, and of its key and value."""
        H, N = self.num_heads, self.state_size
        return FP32_BYTES * (self.inner_size * N + 2 * H * self.pairs + H) + element_bytes * (H * N + self.inner_size)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: inner tensors, and in fp32 keys, queries, phases and the scan."""
        inner, H, N, R = self.inner_size, self.num_heads, self.state_size, self.pairs
        chunk = H * (N * self.head_dim / CHUNK_TOKENS + 2 * CHUNK_TOKENS)
        return (element_bytes * (context.hidden_size + 7 * inner + 2 * N * self.num_groups + 4 * H * N)
                + FP32_BYTES * (6 * H * N + 14 * H * R + 3 * inner + 10 * H + 2 * N + chunk))

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: states are linear, phases add up, and one token is handed over."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        H, N = self.num_heads, self.state_size
        tail = rows * (element_bytes * (H * N + self.inner_size) + FP32_BYTES * H)
        return [ShardTraffic("from_previous", tail, tail), scan_traffic(rows, 2 * H * self.pairs),
                matrix_traffic(rows, H, N, self.head_dim, H)]

    def head_sizes(self) -> HeadSizes | None:
        return None  # heads of a block of twice the width are no measure for other mixers

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        return expanded_heads(options, model, cls)


@register_mixer("mamba3", Mamba3Config)
class Mamba3(TensorStateMixer):
    """Parameters: in_proj [2 I + 2 G N + 3 H + R, D] (z, x, B, C, dt, A, lambda, theta), B_norm and C_norm [N], B_bias
    and C_bias [H, N], dt_bias and D [H], out_proj [D, I], and norm [I] by option.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("dt_bias", "D", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight",
                                                  "norm.weight")
    config: Mamba3Config

    def __init__(self, config: Mamba3Config, context: LayerContext):
        super().__init__()
        self.config = config
        H, N = config.num_heads, config.state_size
        eps = context.norm.eps_or(config.norm_eps)
        self.in_proj = nn.Linear(context.hidden_size, sum(config.widths), bias=False)
        self.B_norm, self.C_norm = RMSNorm(N, eps), RMSNorm(N, eps)
        self.B_bias, self.C_bias = (nn.Parameter(torch.zeros(H, N)) for _ in range(2))
        self.dt_bias, self.D = (nn.Parameter(torch.zeros(H)) for _ in range(2))
        self.norm = HeadRMSNorm(H, config.head_dim, eps) if config.norm else None
        self.out_proj = nn.Linear(config.inner_size, context.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config, dtype = self.config, x_BTD.dtype
        z_BTI, x_BTI, B_BTX, C_BTX, dt_BTH, A_BTH, mix_BTH, theta_BTR = self.in_proj(x_BTD).split(config.widths, -1)
        dt_BTH = F.softplus(wide(dt_BTH) + self.dt_bias)
        g_BTH = (-F.softplus(wide(A_BTH))).clamp_max(LARGEST_RATE) * dt_BTH
        mix_BTH = wide(mix_BTH).sigmoid()
        angle_BTHR = math.pi * wide(theta_BTR).tanh()[:, :, None] * dt_BTH[..., None]
        phase = accumulate_phase(angle_BTHR.flatten(-2), seq, state)
        cos_BTHR, sin_BTHR = (y.unflatten(-1, angle_BTHR.shape[-2:]) for y in phase)
        k_BTHN, q_BTHN = (turn_pairs(self._biased(y, norm, bias), cos_BTHR, sin_BTHR).to(dtype) for y, norm, bias in (
            (B_BTX, self.B_norm, self.B_bias), (C_BTX, self.C_norm, self.C_bias)))
        own_BTH = mix_BTH * dt_BTH
        x_BTHP = x_BTI.unflatten(-1, (config.num_heads, config.head_dim))
        last_k_BTHN = previous_tokens(k_BTHN.flatten(-2), seq, state, "key").view_as(k_BTHN)
        last_x_BTHP = previous_tokens(x_BTI.contiguous(), seq, state, "value").view_as(x_BTHP)
        weight_BTH = previous_tokens(own_BTH, seq, state, "weight") + (1.0 - mix_BTH) * dt_BTH
        v_BTHP = (last_x_BTHP * (weight_BTH * g_BTH.exp())[..., None]).to(dtype)
        y_BTHP = wide(scan_matrix_state(q_BTHN, last_k_BTHN, v_BTHP, g_BTH, seq, state))
        score_BTH = (wide(q_BTHN) * wide(k_BTHN)).sum(-1)
        y_BTHP = (y_BTHP + (own_BTH * score_BTH + self.D)[..., None] * x_BTHP).to(dtype)
        y_BTI = (y_BTHP if self.norm is None else self.norm(y_BTHP)).flatten(-2)
        return self.out_proj(y_BTI * F.silu(z_BTI)), {}

    def _biased(self, y_BTX: Tensor, norm: RMSNorm, bias_HN: Tensor) -> Tensor:
        """Keys or queries of all heads: those of their group, normalised, plus their own bias."""
        groups = self.config.num_groups
        y_BTGN = wide(norm(y_BTX.unflatten(-1, (groups, -1))))
        return y_BTGN.repeat_interleave(self.config.num_heads // groups, 2) + bias_HN

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, dict.fromkeys(("B_bias", "C_bias"), VECTOR))

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Biases of B and C and D are 1, steps start log-uniform, as in the authors' code."""
        init_projections(self, std)
        init_inverse_softplus(self.dt_bias, *DT_INIT)
        for parameter in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(parameter)


def turn_pairs(x_BTHN: Tensor, cos_BTHR: Tensor, sin_BTHR: Tensor) -> Tensor:
    """Turn the first R pairs of neighbouring dims by the angles with these cosines and sines.

    >>> turn_pairs(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0.0]), torch.tensor([1.0]))
    tensor([0., 1., 5.])
    """
    turned = 2 * cos_BTHR.shape[-1]
    pairs_BTHR2 = x_BTHN[..., :turned].unflatten(-1, (-1, 2))
    a_BTHR, b_BTHR = pairs_BTHR2[..., 0], pairs_BTHR2[..., 1]
    new = torch.stack([a_BTHR * cos_BTHR - b_BTHR * sin_BTHR, a_BTHR * sin_BTHR + b_BTHR * cos_BTHR], -1).flatten(-2)
    return torch.cat([new, x_BTHN[..., turned:]], -1)
