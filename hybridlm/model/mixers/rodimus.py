"""Rodimus: linear attention with one key head of few dims and values of twice the width, gated by a temperature.

    u = W_u x;   h = silu(conv(u));   q = W_q h;   a = softplus(W_a h + b_a);   tau = sigmoid(W_tau h + b_tau)
    g = -a tau;   k = a^tau W_k h / |W_k h|;   v = u * sigmoid(W_2 W_1 u + b_v)
    S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T;   o_t = K^-0.5 S_t^T q_t + r * h_t
    out = W_out RMSNorm(o * silu(W_z x))

Source: He et al. 2024 (Rodimus), section 3, and the authors' code (codefuse-ai/rodimus, rodimus_flow.py).

B rows, T tokens, D hidden size, I inner channels, K key dim, HV parts of the values, V dims of each, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps, check_taps_in_shards, conv_traffic
from hybridlm.model.mixers.common.init import init_inverse_softplus, init_projections
from hybridlm.model.mixers.common.matrix_state import FP32_BYTES, matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.norm import GateFirstRMSNorm
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide

CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations
VALUE_HEAD_DIM = 128  # wider values are given to the operation as heads that share q, k and decay: kernels have limits
KEY_NORM_EPS = 1e-12  # least norm by which a key is divided
XAVIER_GAIN = 2**-2.5  # of the projections from inner channels, as published
DECAY_INIT = (1e-3, 1e-1)  # a at the start is log-uniform between these
TAU_INIT = (1 / 16, 0.9)  # tau at the start is uniform between these


@dataclass(kw_only=True)
class RodimusConfig(MixerConfig):
    """Configuration of Rodimus.

    Args:
        expand: inner channels I per dim of the model.
        key_dim: dims K of the one key head.
        value_rank: rank R of the gate on the values; null is a 64th of the hidden size, at least 16.
        conv_size: taps of the convolution, which has a bias and SiLU.
        norm_eps: of the output norm; null takes the model's.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "rodimus"
    expand: int = 2
    key_dim: int = 64
    value_rank: int | None = None
    conv_size: int = 4
    norm_eps: float | None = None
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("expand", "key_dim", "value_rank", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        check_taps(self.conv_size)

    def inner_size(self, context: LayerContext) -> int:
        """Inner channels I."""
        return self.expand * context.hidden_size

    def value_heads(self, context: LayerContext) -> int:
        """Heads that the values are divided into; what is computed does not depend on it."""
        heads, rest = divmod(self.inner_size(context), VALUE_HEAD_DIM)
        return 1 if rest else heads

    def rank(self, context: LayerContext) -> int:
        """Rank R of the gate on the values."""
        return max(context.hidden_size // 64, 16) if self.value_rank is None else self.value_rank

    def _weights(self, context: LayerContext) -> int:
        return self.inner_size(context) * (3 * context.hidden_size + 4 * self.key_dim + 2 * self.rank(context))

    def num_params(self, context: LayerContext) -> int:
        # convolution with its bias, bias of the values' gate, residual and norm
        return self._weights(context) + self.inner_size(context) * (self.conv_size + 4) + 2 * self.key_dim

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it: decay, write and read of every state."""
        inner = self.inner_size(context)
        return {"projections": 2.0 * self._weights(context), "conv": 2.0 * self.conv_size * inner,
                "recurrence": 5.0 * self.key_dim * inner}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the states in fp32 and of the inputs of the convolution in the dtype of the model."""
        return self.inner_size(context) * (FP32_BYTES * self.key_dim + element_bytes * (self.conv_size - 1))

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: inner tensors, and the chunked operation and the norm in fp32."""
        inner, K = self.inner_size(context), self.key_dim
        heads = self.value_heads(context)
        chunk = K * inner / CHUNK_TOKENS + heads * (2 * CHUNK_TOKENS + 4 * K)
        return (element_bytes * (context.hidden_size + 6 * inner + 3 * K + 2 * self.rank(context))
                + FP32_BYTES * (5 * inner + 16 * K + chunk))

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_taps_in_shards(self.conv_size, length)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        inner = self.inner_size(context)
        heads = self.value_heads(context)
        return [*conv_traffic(rows, self.conv_size, inner, element_bytes),
                matrix_traffic(rows, heads, self.key_dim, inner // heads, heads * self.key_dim)]


@register_mixer("rodimus", RodimusConfig)
class Rodimus(TensorStateMixer):
    """Parameters: up_proj and gate_proj [I, D], conv, query_proj, key_proj, select_proj, tau_proj [K, I], select_bias
    and tau_bias [K], value_a_proj [R, I], value_b_proj [I, R] with a bias, skip [I], norm [I] and down_proj [D, I].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("select_bias", "tau_bias", "skip", "norm.weight")
    config: RodimusConfig

    def __init__(self, config: RodimusConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.value_heads = config.value_heads(context)
        D, inner, K, R = context.hidden_size, config.inner_size(context), config.key_dim, config.rank(context)
        self.up_proj, self.gate_proj = (nn.Linear(D, inner, bias=False) for _ in range(2))
        self.conv = CausalConv(inner, config.conv_size)
        self.query_proj, self.key_proj = (nn.Linear(inner, K, bias=False) for _ in range(2))
        self.select_proj, self.tau_proj = (nn.Linear(inner, K, bias=False) for _ in range(2))
        # Apart from their projections: in bf16 they would round all slow decays to a few values.
        self.select_bias, self.tau_bias = (nn.Parameter(torch.zeros(K)) for _ in range(2))
        self.value_a_proj, self.value_b_proj = nn.Linear(inner, R, bias=False), nn.Linear(R, inner)
        self.skip = nn.Parameter(torch.zeros(inner))
        self.norm = GateFirstRMSNorm(inner, 1, context.norm.eps_or(config.norm_eps))
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        u_BTI = self.up_proj(x_BTD)
        h_BTI = self.conv(u_BTI, seq, state)
        v_BTI = u_BTI * self.value_b_proj(self.value_a_proj(u_BTI)).sigmoid()
        a_BTK = F.softplus(wide(self.select_proj(h_BTI)) + self.select_bias).clamp_min(1e-30)
        tau_BTK = (wide(self.tau_proj(h_BTI)) + self.tau_bias).sigmoid()
        k_BTK = F.normalize(wide(self.key_proj(h_BTI)), dim=-1, eps=KEY_NORM_EPS) * a_BTK**tau_BTK
        q_BT1K, k_BT1K = (y.unsqueeze(2) for y in (self.query_proj(h_BTI), k_BTK.to(x_BTD.dtype)))
        g_BTHvK = (-a_BTK * tau_BTK).unsqueeze(2).expand(-1, -1, self.value_heads, -1)
        o_BTHvV = scan_matrix_state(q_BT1K, k_BT1K, v_BTI.unflatten(-1, (self.value_heads, -1)), g_BTHvK, seq, state,
                                    scale=self.config.key_dim**-0.5)
        o_BTI = wide(o_BTHvV.flatten(-2)) + wide(h_BTI) * self.skip
        return self.down_proj(self.norm(o_BTI.to(x_BTD.dtype), self.gate_proj(x_BTD))), {}

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Small projections from inner channels, a log-uniform, tau uniform, skip 1, as in the authors' code."""
        init_projections(self, std)
        self.conv.reset_parameters()
        for layer in (self.query_proj, self.key_proj, self.select_proj, self.tau_proj, self.value_a_proj,
                      self.value_b_proj):
            nn.init.xavier_uniform_(layer.weight, gain=XAVIER_GAIN)
        init_inverse_softplus(self.select_bias, *DECAY_INIT)
        tau_K = self.tau_bias.uniform_(*TAU_INIT)
        self.tau_bias.copy_(torch.log(tau_K / (1 - tau_K)))
        nn.init.ones_(self.skip)
