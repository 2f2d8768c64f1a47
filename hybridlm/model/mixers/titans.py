"""Titans: a neural memory whose weights learn from each token, with momentum, decay and rates from the token.

    S_t = eta_t S_{t-1} - theta_t grad |f(k_t; W) - v_t|^2;   M_t = (1 - alpha_t) M_{t-1} + S_t;   o_t = f(q_t; M_t)
    out = W_o (norm(o_t) * silu(W_g x_t)),   q, k = l2norm(silu(conv(W x))),   v = silu(conv(W_v x))

W are the weights M at the start of the token's chunk; alpha, eta = sigmoid(W x + b), theta = max_rate sigmoid(W x + b).
This is the memory layer alone ("LMM"); the paper's three layouts around it are schedules of other mixers.
Source: Behrouz et al. 2025 (Titans, 2501.00663), sections 3 and 4.4.

B rows, T tokens, D hidden size, H heads, K head dim, F hidden dim of the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridlm.errors import ConfigError, require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.contract import Aux, SequenceMixer, register_mixer
from hybridlm.model.norm import GatedRMSNorm
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import l2_norm, titans_memory
from hybridlm_kernels.precision import wide

FP32_BYTES = 4  # bytes per element
START_STD = 0.02  # of the memory's weights
DECAY_START = 0.001  # alpha; a memory with a hidden layer that has decayed to zero has no gradient to come back by


@dataclass(kw_only=True)
class TitansConfig(StateHeadsConfig):
    """Configuration of the memory of Titans.

    Args:
        num_heads: heads H.
        head_dim: dims K of a head.
        memory: linear (a matrix) or mlp (one hidden layer of `expand` times the head dim).
        expand: hidden dims of the memory per dim of a head (mlp).
        chunk: tokens whose gradients are taken at the same weights.
        max_rate: upper bound of the learning rate theta.
        conv_size: taps of the convolutions over q, k and v.
        norm_eps: of the output norm; null takes the model's.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "titans"
    head_dim: int
    memory: Literal["linear", "mlp"] = "mlp"
    expand: int = 4
    chunk: int = 16
    max_rate: float = 0.01
    conv_size: int = 4
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "expand", "chunk", "max_rate", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        check_taps(self.conv_size)

    @property
    def channels(self) -> int:
        """Channels H K of each projection."""
        return self.num_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Hidden dims F of the memory; 0 where it is linear."""
        return self.expand * self.head_dim if self.memory == "mlp" else 0

    @property
    def memory_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the memory's weights for one head, in the order of the operation."""
        K, hidden = self.head_dim, self.hidden_dim
        return {"W1": (K, hidden), "W2": (hidden, K)} if hidden else {"W1": (K, K)}

    @property
    def memory_size(self) -> int:
        """Weights of the memory of one head."""
        return sum(rows * columns for rows, columns in self.memory_shapes.values())

    def _projection_params(self, context: LayerContext) -> int:
        return context.hidden_size * (5 * self.channels + 3 * self.num_heads)

    def num_params(self, context: LayerContext) -> int:
        vectors = 3 * self.num_heads + self.head_dim
        return (self._projection_params(context) + 3 * self.conv_size * self.channels + vectors
                + self.num_heads * self.memory_size)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Reads of memory and momentum, the gradient, both updates, and products between tokens of a chunk."""
        passes = 5 if self.memory == "linear" else 5.5  # the first layer has no gradient to its input
        widths = 2 * self.head_dim + (3 * self.hidden_dim if self.hidden_dim else 0)
        recurrence = self.num_heads * (2.0 * passes * self.memory_size + self.chunk * widths)
        return {"projections": 2.0 * self._projection_params(context), "conv": 6.0 * self.conv_size * self.channels,
                "recurrence": recurrence}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes in fp32 of the memory (at the start of the chunk, now) and its momentum; inputs of convolutions."""
        memory = 3 * FP32_BYTES * self.num_heads * self.memory_size
        return memory + 3 * element_bytes * (self.conv_size - 1) * self.channels

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: projections, chunks and their factors, and some of the states."""
        states = 3 * self.memory_size / (4 * self.chunk)  # one per four chunks
        factors = 6 * self.chunk + 20
        return (element_bytes * (context.hidden_size + 10 * self.channels)
                + FP32_BYTES * (8 * self.channels + self.num_heads * (states + factors)))

    def check_context_parallel(self, shards: int, length: int) -> None:
        raise ConfigError("kind", "cannot work on split rows: each chunk learns from the weights before it, and shards "
                          "would have to wait for one another", got=self.kind, expected="engine.context_parallel=1")

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        return data if self.memory == "mlp" else {key: value for key, value in data.items() if key != "expand"}


@register_mixer("titans", TitansConfig)
class Titans(SequenceMixer):
    """Parameters: q_proj, k_proj, v_proj, g_proj [H K, D], o_proj [D, H K], q_conv, k_conv, v_conv; alpha_proj,
    eta_proj and theta_proj [H, D] with alpha_bias, eta_bias and theta_bias [H]; the memory's W1 (W2) with H in front;
    o_norm [K].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("W1", "W2", "alpha_bias", "eta_bias", "theta_bias", "o_norm.weight")
    config: TitansConfig

    def __init__(self, config: TitansConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, C = context.hidden_size, config.num_heads, config.channels
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (nn.Linear(D, C, bias=False) for _ in range(4))
        self.q_conv, self.k_conv, self.v_conv = (CausalConv(C, config.conv_size, bias=False) for _ in range(3))
        for name in ("alpha", "eta", "theta"):
            setattr(self, f"{name}_proj", nn.Linear(D, H, bias=False))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(H)))
        for name, shape in config.memory_shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(H, *shape)))
        self.o_norm = GatedRMSNorm(config.head_dim, context.norm.eps_or(config.norm_eps), "silu")
        self.o_proj = nn.Linear(C, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        heads = (config.num_heads, config.head_dim)
        q_BTHK, k_BTHK, v_BTHK = (
            getattr(self, f"{name}_conv")(getattr(self, f"{name}_proj")(x_BTD), seq, state, f"{name}_conv").unflatten(
                -1, heads) for name in "qkv")
        alpha, eta, theta = ((wide(getattr(self, f"{name}_proj")(x_BTD)) + getattr(self, f"{name}_bias")).sigmoid()
                             for name in ("alpha", "eta", "theta"))
        weights_HP = torch.cat([getattr(self, name).flatten(1) for name in config.memory_shapes], 1)
        start = None if state is None else state.tensors.get("memory")
        seen = 0 if start is None else seq.last_position + 1 - x_BTD.shape[1]
        o_BTHK, memory = titans_memory(
            l2_norm(q_BTHK), l2_norm(k_BTHK), v_BTHK, alpha, eta, config.max_rate * theta, weights_HP,
            hidden_dim=config.hidden_dim, chunk=config.chunk, initial_state=start, open_tokens=seen % config.chunk,
            cu_seqlens=seq.cu_seqlens)
        if state is not None:
            state.tensors["memory"] = memory
        return self.o_proj(self.o_norm(o_BTHK, self.g_proj(x_BTD).unflatten(-1, heads)).flatten(-2)), {}

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj"), self.config.num_heads)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, dict.fromkeys(("W1", "W2"), ParameterRole("expert_stack")), self.head_rows())

    def new_state(self, batch: int, max_length: int) -> TensorState:
        return TensorState()  # rows of unlike lengths cannot be decoded together: their chunks end apart

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """The memory starts as normal(0, 0.02), decay at 0.001, momentum and rate halfway; the paper gives no start."""
        init_projections(self, std)
        for name in "qkv":
            getattr(self, f"{name}_conv").reset_parameters()
        nn.init.constant_(self.get_parameter("alpha_bias"), math.log(DECAY_START / (1 - DECAY_START)))
        for name in ("eta_bias", "theta_bias"):
            nn.init.zeros_(self.get_parameter(name))
        for name in self.config.memory_shapes:
            nn.init.normal_(getattr(self, name), std=START_STD)
