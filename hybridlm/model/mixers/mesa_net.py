"""MesaNet: linear attention whose query is the solution of a least squares problem over the keys so far.

    S_t = e^{g_t} S_{t-1} + beta_t k_t k_t^T;   V_t = e^{g_t} V_{t-1} + beta_t k_t v_t^T
    o_t = V_t^T (S_t + Diag(lambda))^{-1} q_t;  out = W_o norm(o_t)

with q, k = l2norm(silu(conv(W x))), v = W_v x, beta = sigmoid(W_b x + b), g = logsigmoid(W_a x + a). Of all
linear maps from keys to values, V_t^T (S_t + Diag(lambda))^{-1} has the smallest regularised squared error over the
tokens so far, recent ones counting more.
Source: von Oswald et al. 2025 (MesaNet), sections 3 and 4.

B rows, T tokens, D hidden size, H heads, K head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps, check_taps_in_shards, conv_traffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.matrix_state import compute_decay_from_start, matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import l2_norm, linear_attention, mesa_solve

FP32_BYTES = 4  # bytes per element
LAMBDA_START = 1.0


@dataclass(kw_only=True)
class MesaNetConfig(StateHeadsConfig):
    """Configuration of MesaNet.

    Args:
        num_heads: heads H.
        head_dim: dims K of a head, for keys and values.
        conv_size: taps of the convolutions over q and k.
        lambda_min: lower bound of the regularisation lambda, which is learned per channel and starts at 1.
        iterations: steps of the conjugate gradient method, in training and decoding.
        norm_eps: of the output norm; null takes the model's.

    Raises:
        ConfigError: a size that is not positive, or a bound that leaves no room for the start of lambda.
    """

    kind: str = "mesa_net"
    num_heads: int
    head_dim: int
    conv_size: int = 4
    lambda_min: float = 0.25
    iterations: int = 30
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "iterations", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        require(0 <= self.lambda_min < LAMBDA_START, "lambda_min", "must be below the start of lambda",
                got=self.lambda_min, expected=f"0 or more, below {LAMBDA_START:g}")
        check_taps(self.conv_size)

    @property
    def channels(self) -> int:
        """Channels H K of each projection."""
        return self.num_heads * self.head_dim

    def _weights(self, context: LayerContext) -> int:
        return context.hidden_size * (4 * self.channels + 2 * self.num_heads)

    def num_params(self, context: LayerContext) -> int:
        vectors = 2 * self.num_heads + self.channels + self.head_dim  # biases, lambda, norm
        return self._weights(context) + 2 * self.conv_size * self.channels + vectors

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Each iteration is counted as one linear attention, and so are the states of keys and values."""
        return {"projections": 2.0 * self._weights(context), "conv": 4.0 * self.conv_size * self.channels,
                "recurrence": (self.iterations + 2) * 5.0 * self.channels * self.head_dim}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of both states in fp32 and of the inputs of the convolutions in the dtype of the model."""
        return self.channels * (2 * FP32_BYTES * self.head_dim + 2 * element_bytes * (self.conv_size - 1))

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: projections, and the solve and the read in fp32."""
        C = self.channels
        chunk = self.num_heads * (self.head_dim**2 / 32 + 64)  # chunks of 32 tokens of the read
        return element_bytes * (context.hidden_size + 9 * C) + FP32_BYTES * (10 * C + chunk)

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_taps_in_shards(self.conv_size, length)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        state = matrix_traffic(rows, self.num_heads, self.head_dim, self.head_dim, self.num_heads)
        return [*2 * conv_traffic(rows, self.conv_size, self.channels, element_bytes), state, state]


@register_mixer("mesa_net", MesaNetConfig)
class MesaNet(TensorStateMixer):
    """Parameters: q_proj, k_proj, v_proj [H K, D], q_conv, k_conv, a_proj and b_proj [H, D], a_bias and b_bias [H],
    lambda_raw [H K], o_norm [K], o_proj [D, H K].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("a_bias", "b_bias", "lambda_raw", "o_norm.weight")
    config: MesaNetConfig

    def __init__(self, config: MesaNetConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, C, H = context.hidden_size, config.channels, config.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, C, bias=False) for _ in range(3))
        self.q_conv, self.k_conv = (CausalConv(C, config.conv_size, bias=False) for _ in range(2))
        self.a_proj, self.b_proj = (nn.Linear(D, H, bias=False) for _ in range(2))
        self.a_bias, self.b_bias = (nn.Parameter(torch.zeros(H)) for _ in range(2))
        self.lambda_raw = nn.Parameter(torch.zeros(C))
        self.o_norm = RMSNorm(config.head_dim, context.norm.eps_or(config.norm_eps))
        self.o_proj = nn.Linear(C, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        heads = (config.num_heads, config.head_dim)
        q_BTHK = l2_norm(self.q_conv(self.q_proj(x_BTD), seq, state, "q_conv").unflatten(-1, heads))
        k_BTHK = l2_norm(self.k_conv(self.k_proj(x_BTD), seq, state, "k_conv").unflatten(-1, heads))
        v_BTHK = self.v_proj(x_BTD).unflatten(-1, heads)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        g_BTH = F.logsigmoid(self.a_proj(x_BTD).to(wide) + self.a_bias)
        beta_BTH = (self.b_proj(x_BTD).to(wide) + self.b_bias).sigmoid()
        lambda_HK = config.lambda_min + F.softplus(self.lambda_raw).view(heads)
        start = None if state is None else state.tensors.get("keys")
        if seq.shard is not None:
            start = self._keys_of_earlier_shards(k_BTHK, beta_BTH, g_BTH, seq)
        # In fp32: what a solver loses, no later step brings back.
        read_BTHK, keys_NHKK = mesa_solve(q_BTHK.to(wide), k_BTHK.to(wide), beta_BTH, g_BTH, lambda_HK,
                                          iterations=config.iterations, initial_state=start,
                                          cu_seqlens=seq.cu_seqlens)
        if state is not None:
            state.tensors["keys"] = keys_NHKK
        written_BTHK = (beta_BTH[..., None] * k_BTHK).to(v_BTHK.dtype)
        o_BTHK = scan_matrix_state(read_BTHK.to(v_BTHK.dtype), written_BTHK, v_BTHK, g_BTH, seq, state)
        return self.o_proj(self.o_norm(o_BTHK).flatten(-2)), {}

    def _keys_of_earlier_shards(self, k_BTHK: Tensor, beta_BTH: Tensor, g_BTH: Tensor, seq: SequenceInfo) -> Tensor:
        """The second moments of the keys [documents, H, K, K] before each document of this shard."""
        assert seq.shard is not None
        k_BTHK = k_BTHK.to(g_BTH.dtype)
        _, added_NHKK = linear_attention(k_BTHK, k_BTHK, beta_BTH[..., None] * k_BTHK, g=g_BTH,
                                         cu_seqlens=seq.cu_seqlens)
        left_BTH1 = compute_decay_from_start(g_BTH, added_NHKK.dtype, seq.shard)
        incoming_BHKK = seq.shard.incoming(seq.shard.at_end(added_NHKK), left_BTH1[:, -1, :, :, None], torch.mul)
        return seq.shard.at_start(incoming_BHKK)

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("q_proj", "k_proj", "v_proj"), self.config.num_heads)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Lambda starts at 1, biases of the gates at 0."""
        init_projections(self, std)
        self.q_conv.reset_parameters()
        self.k_conv.reset_parameters()
        nn.init.zeros_(self.a_bias)
        nn.init.zeros_(self.b_bias)
        nn.init.constant_(self.lambda_raw, math.log(math.expm1(LAMBDA_START - self.config.lambda_min)))
