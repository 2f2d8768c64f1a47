"""Mamba-3: Mamba-2 with a trapezoidal step, states that turn, several writes and reads per token, and no convolution.

    z, x, B, C, dt, A, lambda, theta = W_in u;   dt = softplus(dt + dt_bias);   A = -softplus(A), at most -1e-4
    a = e^{dt A};   lambda = sigmoid(lambda);    phi_t = phi_{t-1} + pi tanh(theta_t) dt_t
    k = turn(RMSNorm(B) + B_bias, phi),          q = turn(RMSNorm(C) + C_bias, phi)
    S_t = a_t S_{t-1} + (1 - lambda_t) dt_t a_t k_{t-1} x_{t-1}^T + lambda_t dt_t k_t x_t^T
    y_t = S_t^T q_t + D x_t;   out = W_out (y * silu(z))

With R > 1 (several inputs and outputs, MIMO) each head has R keys and queries, and values x_r = x * mimo_x_r; k x^T is
the sum of all k_r x_r^T, and y the sum of (S_t^T q_r + D x_r) * silu(z * mimo_z_r) * mimo_o_r.

What tokens before t wrote is P_t = a_t (P_{t-1} + c_t k_{t-1} x_{t-1}^T) with c_t = lambda_{t-1} dt_{t-1} +
(1 - lambda_t) dt_t: linear attention on the keys and values of the token before. The token's own write is one product.
R writes are R rows of that operation, of which the first alone decays; R reads are R rows behind them that write
nothing.
Source: Lahoti et al. 2026 (Mamba-3), and the authors' code (mamba_ssm, mamba3.py, as first published).

B rows, T tokens, D hidden size, I inner channels, H heads, P dims per head, G groups, N states per channel, A turned
pairs of states, R rank: inputs and outputs per head, S = T R rows.
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
MIMO = ("mimo_x", "mimo_z", "mimo_o")  # scales of the values, gates and outputs of each rank


@dataclass(kw_only=True)
class Mamba3Config(StateHeadsConfig):
    """Configuration of Mamba-3.

    Args:
        num_heads: heads H, a multiple of the groups; the inner channels are I = H P.
        head_dim: dims P of a head.
        state_size: states N per channel.
        num_groups: groups G of heads that share B and C, but for their biases.
        rank: inputs and outputs R per head: 1 (SISO), or several (MIMO), 4 in the paper.
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
    rank: int = 1
    rope_fraction: float = 0.5
    norm: bool = False
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "state_size", "num_groups", "rank", "norm_eps"):
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
        """Pairs A of states that turn."""
        return int(self.state_size * self.rope_fraction) // 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of in_proj: z, x, B, C, dt, A, lambda and theta."""
        inner, keys, H = self.inner_size, self.rank * self.num_groups * self.state_size, self.num_heads
        return inner, inner, keys, keys, H, H, H, self.pairs

    def _weights(self, context: LayerContext) -> int:
        return context.hidden_size * (sum(self.widths) + self.inner_size)

    def num_params(self, context: LayerContext) -> int:
        biases = 2 * self.num_heads * self.rank * self.state_size
        scales = 3 * self.rank * self.inner_size if self.rank > 1 else 0
        return (self._weights(context) + biases + scales + 2 * self.state_size + 2 * self.num_heads
                + self.norm * self.inner_size)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Decay of every state, its writes and reads; turning keys and queries, and the token's own writes."""
        R, inner, N = self.rank, self.inner_size, self.state_size
        turning = R * self.num_heads * 26.0 * self.pairs
        products = R * R * (2.0 * self.num_heads * N + 2.0 * inner)  # of the token's queries with its own keys
        return {"projections": 2.0 * self._weights(context),
                "recurrence": (1.0 + 4.0 * R) * inner * N + turning + products + 3.0 * R * inner}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of states, phases and the last token's write factor in fp32, and of its key and value."""
        H, N = self.num_heads, self.state_size
        last = self.rank * H * N + self.inner_size
        return FP32_BYTES * (self.inner_size * N + 2 * H * self.pairs + H) + element_bytes * last

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: inner tensors, and in fp32 keys, queries, phases and the scan."""
        inner, H, N, R = self.inner_size, self.num_heads, self.state_size, self.rank
        chunk = R * H * (N * self.head_dim / CHUNK_TOKENS + 2 * CHUNK_TOKENS)
        turning = FP32_BYTES * R * H * (6 * N + 14 * self.pairs)
        keys = 2 * R * N * (self.num_groups + 2 * H)
        return (element_bytes * (context.hidden_size + (3 + 4 * R) * inner + keys) + turning
                + FP32_BYTES * (3 * R * inner + (10 + 4 * R * R) * H + 2 * N + chunk))

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: states are linear, phases add up, and one token is handed over."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        H, N = self.num_heads, self.state_size
        tail = rows * (element_bytes * (self.rank * H * N + self.inner_size) + FP32_BYTES * H)
        return [ShardTraffic("from_previous", tail, tail), scan_traffic(rows, 2 * H * self.pairs),
                matrix_traffic(rows, H, N, self.head_dim, H)]

    def head_sizes(self) -> HeadSizes | None:
        return None  # heads of a block of twice the width are no measure for other mixers

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        return expanded_heads(options, model, cls)


@register_mixer("mamba3", Mamba3Config)
class Mamba3(TensorStateMixer):
    """Parameters: in_proj [2 I + 2 R G N + 3 H + A, D] (z, x, B, C, dt, A, lambda, theta), B_norm and C_norm [N],
    B_bias and C_bias [H, R, N], dt_bias and D [H], out_proj [D, I].

    With R > 1 also mimo_x, mimo_z and mimo_o [H, R, P]; by option norm [I].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("dt_bias", "D", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight",
                                                  "norm.weight", *MIMO)
    config: Mamba3Config
    mimo_x: nn.Parameter | None
    mimo_z: nn.Parameter | None
    mimo_o: nn.Parameter | None

    def __init__(self, config: Mamba3Config, context: LayerContext):
        super().__init__()
        self.config = config
        H, R, N = config.num_heads, config.rank, config.state_size
        eps = context.norm.eps_or(config.norm_eps)
        self.in_proj = nn.Linear(context.hidden_size, sum(config.widths), bias=False)
        self.B_norm, self.C_norm = RMSNorm(N, eps), RMSNorm(N, eps)
        self.B_bias, self.C_bias = (nn.Parameter(torch.zeros(H, R, N)) for _ in range(2))
        self.dt_bias, self.D = (nn.Parameter(torch.zeros(H)) for _ in range(2))
        for name in MIMO:
            self.register_parameter(name, nn.Parameter(torch.zeros(H, R, config.head_dim)) if R > 1 else None)
        self.norm = HeadRMSNorm(H, config.head_dim, eps) if config.norm else None
        self.out_proj = nn.Linear(config.inner_size, context.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config, dtype = self.config, x_BTD.dtype
        z_BTI, x_BTI, B_BTX, C_BTX, dt_BTH, A_BTH, mix_BTH, theta_BTA = self.in_proj(x_BTD).split(config.widths, -1)
        dt_BTH = F.softplus(wide(dt_BTH) + self.dt_bias)
        g_BTH = (-F.softplus(wide(A_BTH))).clamp_max(LARGEST_RATE) * dt_BTH
        mix_BTH = wide(mix_BTH).sigmoid()
        angle_BTHA = math.pi * wide(theta_BTA).tanh()[:, :, None] * dt_BTH[..., None]
        phase = accumulate_phase(angle_BTHA.flatten(-2), seq, state)
        cos_BT1HA, sin_BT1HA = (y.unflatten(-1, (1, *angle_BTHA.shape[-2:])) for y in phase)
        k_BTRHN, q_BTRHN = (turn_pairs(self._biased(y, norm, bias), cos_BT1HA, sin_BT1HA).to(dtype)
                            for y, norm, bias in ((B_BTX, self.B_norm, self.B_bias), (C_BTX, self.C_norm, self.C_bias)))
        own_BTH = mix_BTH * dt_BTH
        weight_BTH = previous_tokens(own_BTH, seq, state, "weight") + (1.0 - mix_BTH) * dt_BTH
        last_k_BTRHN = previous_tokens(k_BTRHN.flatten(2), seq, state, "key").view_as(k_BTRHN)
        x_BTRHP = self._ranks(x_BTI, self.mimo_x)
        last_x_BTRHP = self._ranks(previous_tokens(x_BTI.contiguous(), seq, state, "value"), self.mimo_x)
        v_BTRHP = (last_x_BTRHP * (weight_BTH * g_BTH.exp())[:, :, None, :, None]).to(dtype)
        q_BSHN, last_k_BSHN, v_BSHP = (y.flatten(1, 2) for y in (q_BTRHN, last_k_BTRHN, v_BTRHP))
        y_BTRHP = scan_matrix_state(q_BSHN, last_k_BSHN, v_BSHP, g_BTH, seq, state, rows=config.rank).view_as(v_BTRHP)
        # Each row has read what the rows up to it have written, and nothing of the token's own key.
        missing_BTRHP = multiply_ranks(q_BTRHN, last_k_BTRHN, v_BTRHP, later=True) if config.rank > 1 else 0.0
        new_BTRHP = own_BTH[:, :, None, :, None] * multiply_ranks(q_BTRHN, k_BTRHN, x_BTRHP)
        y_BTRHP = (wide(y_BTRHP) + missing_BTRHP + new_BTRHP + self.D[:, None] * x_BTRHP).to(dtype)
        y_BTRHP = y_BTRHP if self.norm is None else self.norm(y_BTRHP)
        y_BTRHP = y_BTRHP * F.silu(self._ranks(z_BTI, self.mimo_z))
        if self.mimo_o is not None:
            y_BTRHP = (y_BTRHP * self.mimo_o.transpose(0, 1)).sum(2, keepdim=True)
        return self.out_proj(y_BTRHP.flatten(2).to(dtype)), {}

    def _biased(self, y_BTX: Tensor, norm: RMSNorm, bias_HRN: Tensor) -> Tensor:
        """Keys or queries of all ranks and heads: those of their group, normalised, plus their own bias."""
        groups = self.config.num_groups
        y_BTRGN = wide(norm(y_BTX.unflatten(-1, (self.config.rank, groups, -1))))
        return y_BTRGN.repeat_interleave(self.config.num_heads // groups, 3) + bias_HRN.transpose(0, 1)

    def _ranks(self, x_BTI: Tensor, scale_HRP: Tensor | None) -> Tensor:
        """The heads [B, T, R, H, P] of x, times the scales of each rank."""
        x_BT1HP = x_BTI.unflatten(-1, (1, self.config.num_heads, -1))
        return x_BT1HP if scale_HRP is None else (x_BT1HP * scale_HRP.transpose(0, 1)).to(x_BTI.dtype)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, dict.fromkeys(("B_bias", "C_bias", *MIMO), VECTOR))

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Biases of B and C and D are 1, steps start log-uniform, ranks have even shares (the authors' code)."""
        init_projections(self, std)
        init_inverse_softplus(self.dt_bias, *DT_INIT)
        for parameter in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(parameter)
        if self.mimo_x is not None and self.mimo_z is not None and self.mimo_o is not None:
            nn.init.ones_(self.mimo_z)
            for parameter in (self.mimo_x, self.mimo_o):
                nn.init.constant_(parameter, 1.0 / self.config.rank)


def multiply_ranks(q_BTRHN: Tensor, k_BTRHN: Tensor, v_BTRHP: Tensor, later: bool = False) -> Tensor:
    """Read the keys of all ranks of a token by the queries of each, [B, T, R, H, P] in fp32 at least.

    Args:
        q_BTRHN: queries.
        k_BTRHN: keys.
        v_BTRHP: values of the keys.
        later: whether to read the keys of later ranks alone.

    >>> ones = torch.ones(1, 1, 2, 1, 1)
    >>> multiply_ranks(ones, ones, ones).flatten(), multiply_ranks(ones, ones, ones, later=True).flatten()
    (tensor([2., 2.]), tensor([1., 0.]))
    """
    q, k, v = (wide(x).transpose(2, 3) for x in (q_BTRHN, k_BTRHN, v_BTRHP))
    with torch.autocast(q.device.type, enabled=False):
        scores_BTHRR = q @ k.mT
        return ((scores_BTHRR.triu(1) if later else scores_BTHRR) @ v).transpose(2, 3)


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
