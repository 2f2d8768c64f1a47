"""TTT-Linear and TTT-MLP: the state is a small model that learns from each mini-batch of tokens as they come.

    W_j = W - scale_j sum_{s<=j} rate_s grad 1/2 |LN(f(k_s; W)) - (v_s - k_s)|^2;   o_j = q_j + LN(f(q_j; W_j))
    out = W_o LayerNorm(o),   in the Mamba-like block  W_o (gelu(W_g x) * LayerNorm(o))

with rate_s = base_rate * sigmoid(w x_s + b) / K and scale_j = max(1 / (j + 1) + learned_j, 0), j the place of the token
in its mini-batch.
Source: Sun et al. 2024, Learning to (Learn at Test Time), sections 2 and 3.

B rows, T tokens, D hidden size, H heads, K head dim, F hidden dim of the memory, M tokens of a mini-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import ConfigError, require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.contract import Aux, SequenceMixer, register_mixer
from hybridlm.model.norm import HeadGroupNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import ttt_memory

FP32_BYTES = 4  # bytes per element
NORM_EPS = 1e-6  # of both norms
START_STD = 0.02  # of the memory's weights


@dataclass(kw_only=True)
class TTTConfig(StateHeadsConfig):
    """Configuration of test-time training.

    Args:
        num_heads: heads H.
        head_dim: dims K of a head.
        memory: linear (TTT-Linear) or mlp (TTT-MLP, one hidden layer of `expand` times the head dim).
        expand: hidden dims of the memory per dim of a head (mlp).
        mini_batch: tokens M per step on the memory's weights.
        base_rate: factor on the learned rates.
        rope_theta: base of the rotation of queries and keys by the place in the mini-batch; null rotates nothing.
        conv_size: taps of two convolutions with bias over one shared projection, which make q and k (the Mamba-like
            block); 0 projects q and k apart.
        output_gate: none, or gelu (the Mamba-like block).

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "ttt"
    num_heads: int
    head_dim: int
    memory: Literal["linear", "mlp"] = "linear"
    expand: int = 4
    mini_batch: int = 16
    base_rate: float = 1.0
    rope_theta: float | None = 10000.0
    conv_size: int = 0
    output_gate: Literal["none", "gelu"] = "none"

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "expand", "mini_batch", "base_rate"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        check_taps(self.conv_size, optional=True)
        self.rope.check(self.head_dim, "head_dim")

    @property
    def rope(self) -> RopeConfig:
        """The rotation of queries and keys."""
        if self.rope_theta is None:
            return RopeConfig(kind="none")
        return RopeConfig(kind="interleaved", theta=self.rope_theta)

    @property
    def channels(self) -> int:
        """Channels H K of each projection."""
        return self.num_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Hidden dims F of the memory; 0 where it is linear."""
        return self.expand * self.head_dim if self.memory == "mlp" else 0

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the memory's weights for one head, in the order of the operation."""
        K, hidden = self.head_dim, self.hidden_dim
        if self.memory == "linear":
            return {"W1": (K, K), "b1": (K,)}
        return {"W1": (K, hidden), "b1": (hidden,), "W2": (hidden, K), "b2": (K,)}

    def _memory_matrices(self) -> int:
        """Weights of the memory's matrices, per head."""
        return self.head_dim * (2 * self.hidden_dim if self.memory == "mlp" else self.head_dim)

    def _memory_params(self) -> int:
        return self._memory_matrices() + self.hidden_dim + self.head_dim

    def _projection_params(self, context: LayerContext) -> int:
        D = context.hidden_size
        matrices = (3 if self.conv_size else 4) + (self.output_gate != "none")
        return D * (matrices * self.channels + self.num_heads)

    def num_params(self, context: LayerContext) -> int:
        convolutions = 2 * self.channels * (self.conv_size + 1) if self.conv_size else 0
        norms = 4 * self.channels  # of the memory and of the output, weight and bias
        return (self._projection_params(context) + self.num_heads + convolutions + norms + self.mini_batch
                + self.num_heads * self._memory_params())

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Reading the memory with key and query, its gradient, and the products between tokens of a mini-batch."""
        passes = 3 if self.memory == "linear" else 3.5  # the first layer has no gradient to its input
        widths = 2 * self.head_dim + (3 * self.hidden_dim if self.hidden_dim else 0)
        recurrence = self.num_heads * (2.0 * passes * self._memory_matrices() + 2.0 * self.mini_batch * widths)
        return {"projections": 2.0 * self._projection_params(context),
                "conv": 4.0 * self.conv_size * self.channels, "recurrence": recurrence}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes in fp32 of the memory and of the gradients of the open mini-batch; inputs of the convolutions."""
        memory = 2 * FP32_BYTES * self.num_heads * self._memory_params()
        return memory + 2 * element_bytes * max(self.conv_size - 1, 0) * self.channels

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: projections, inputs of mini-batches, and some of the states."""
        C = self.channels
        states = self.num_heads * self._memory_params() / (4 * self.mini_batch)  # one per four mini-batches
        return element_bytes * (context.hidden_size + 8 * C) + FP32_BYTES * (9 * C + states)

    def check_context_parallel(self, shards: int, length: int) -> None:
        raise ConfigError("kind", "cannot work on split rows: each mini-batch learns from the weights before it, and "
                          "shards would have to wait for one another", got=self.kind,
                          expected="engine.context_parallel=1")

    def canonical(self, norm: Any) -> dict[str, Any]:
        data = super().canonical(norm)
        return data if self.memory == "mlp" else {key: value for key, value in data.items() if key != "expand"}

    def rotates(self) -> bool:
        return self.rope.kind != "none"


@register_mixer("ttt", TTTConfig)
class TTT(SequenceMixer):
    """Parameters: q_proj, k_proj, v_proj [H K, D], o_proj [D, H K], rate_proj [H, D], rate_bias [H], place_scale [M],
    memory_norm_weight and memory_norm_bias [H, K], the memory's W1, b1 (W2, b2) with H in front, o_norm; in the
    Mamba-like block q_conv and k_conv in place of k_proj, and g_proj.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("place_scale", "memory_norm_weight", "memory_norm_bias", "W1", "b1",
                                                  "W2", "b2", "o_norm.weight", "o_norm.bias", "rate_bias")
    config: TTTConfig

    def __init__(self, config: TTTConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, C = context.hidden_size, config.num_heads, config.channels
        self.q_proj = nn.Linear(D, C, bias=False)
        if config.conv_size:
            self.q_conv, self.k_conv = (CausalConv(C, config.conv_size, activation=None) for _ in range(2))
        else:
            self.k_proj = nn.Linear(D, C, bias=False)
        self.v_proj = nn.Linear(D, C, bias=False)
        self.rate_proj = nn.Linear(D, H, bias=False)
        self.rate_bias = nn.Parameter(torch.zeros(H))
        self.place_scale = nn.Parameter(torch.zeros(config.mini_batch))
        self.memory_norm_weight = nn.Parameter(torch.ones(H, config.head_dim))
        self.memory_norm_bias = nn.Parameter(torch.zeros(H, config.head_dim))
        for name, shape in config.memory_shapes().items():
            setattr(self, name, nn.Parameter(torch.zeros(H, *shape)))
        self.o_norm = HeadGroupNorm(1, C, NORM_EPS)
        if config.output_gate != "none":
            self.g_proj = nn.Linear(D, C, bias=False)
        self.o_proj = nn.Linear(C, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        heads = (config.num_heads, config.head_dim)
        q_BTC = self.q_proj(x_BTD)
        if config.conv_size:
            k_BTC = self.k_conv(q_BTC, seq, state, "k_conv")
            q_BTC = self.q_conv(q_BTC, seq, state, "q_conv")
        else:
            k_BTC = self.k_proj(x_BTD)
        v_BTHK = self.v_proj(x_BTD).unflatten(-1, heads)
        places = self._places(seq)
        q_BTHK, k_BTHK = (rotate(y.unflatten(-1, heads), config.rope, config.rope.rotary_dim(config.head_dim), places)
                          for y in (q_BTC, k_BTC))
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        rate_BTH = (self.rate_proj(x_BTD).to(wide) + self.rate_bias).sigmoid() * (config.base_rate / config.head_dim)
        place_M = 1.0 / torch.arange(1, config.mini_batch + 1, device=x_BTD.device)
        weights_HP = torch.cat([getattr(self, name).flatten(1) for name in config.memory_shapes()], 1)
        start = None if state is None else state.tensors.get("memory")
        seen = 0 if start is None else seq.last_position + 1 - x_BTD.shape[1]
        o_BTHK, memory = ttt_memory(
            q_BTHK, k_BTHK, v_BTHK, rate_BTH, (place_M + self.place_scale).clamp(min=0.0), weights_HP,
            self.memory_norm_weight, self.memory_norm_bias, hidden_dim=config.hidden_dim, eps=NORM_EPS,
            initial_state=start, open_tokens=seen % config.mini_batch, cu_seqlens=seq.cu_seqlens)
        if state is not None:
            state.tensors["memory"] = memory
        y_BTC = self.o_norm(o_BTHK.flatten(-2))
        if config.output_gate != "none":
            y_BTC = F.gelu(self.g_proj(x_BTD), approximate="tanh") * y_BTC
        return self.o_proj(y_BTC), {}

    def _places(self, seq: SequenceInfo) -> SequenceInfo:
        """The same tokens, their positions counted from the start of their mini-batch; all layers share it."""
        key = f"places in mini-batches of {self.config.mini_batch}"
        if key not in seq.tables:
            seq.tables[key] = SequenceInfo(seq.positions_BT % self.config.mini_batch)
        return seq.tables[key]

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj"), self.config.num_heads)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        vectors = dict.fromkeys(("memory_norm_weight", "memory_norm_bias", "b1", "b2"), VECTOR)
        return find_roles(self, vectors | dict.fromkeys(("W1", "W2"), ParameterRole("expert_stack")), self.head_rows())

    def new_state(self, batch: int, max_length: int) -> TensorState:
        return TensorState()  # rows of unlike lengths cannot be decoded together: their mini-batches end apart

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """The memory starts as normal(0, 0.02) with zero biases, and steps are those on mean gradients."""
        init_projections(self, std)
        for convolution in (self.q_conv, self.k_conv) if self.config.conv_size else ():
            convolution.reset_parameters()
        nn.init.ones_(self.memory_norm_weight)
        for vector in (self.memory_norm_bias, self.place_scale, self.rate_bias):
            nn.init.zeros_(vector)
        for name in self.config.memory_shapes():
            if name.startswith("W"):
                nn.init.normal_(getattr(self, name), std=START_STD)
            else:
                nn.init.zeros_(getattr(self, name))
