"""Mixture of memories (MoM): a router sends each token to a few of several states, each a Gated DeltaNet of its own.

    w = softmax(W_r x) over M memories, the A largest kept and divided by their sum
    o_t = sum_{m chosen} w_m GDN_m(x of the tokens sent to m, up to t) + GDN_shared(x of all tokens up to t)
    out = W_o (norm(o) * silu(W_g x))

Each memory has keys, values, decays and write strengths of its own; queries, convolutions and the parameters of the
forget gate serve all. A memory sees the tokens sent to it as one sequence: its convolutions and its recurrence run over
these alone. Tokens are sorted by document and memory into packed rows, so no memory has a capacity and none drops a
token.
Source: Du et al. 2025 (MoM, 2502.13685), section 3, and flash-linear-attention's layer.

B rows, T tokens, D hidden size, M memories, E memories with the shared one, A chosen per token, H heads, K key dim, V
value dim, N documents, R rows: pairs of a token and a memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import ConfigError, require
from hybridlm.model.balance import balance_loss
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps
from hybridlm.model.mixers.common.init import init_inverse_softplus, init_log_uniform, init_projections
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.norm import GatedRMSNorm
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens, Gate, delta_rule
from hybridlm_kernels.recurrence.chunk_layout import MAX_CHUNK_TOKENS

FP32_BYTES = 4  # bytes per element
CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations
A_INIT = (0.0, 16.0)  # A starts uniform between these
DT_INIT = (1e-3, 1e-1)  # step sizes at the start are log-uniform between these


@dataclass(kw_only=True)
class MoMConfig(StateHeadsConfig):
    """Configuration of a mixture of memories.

    Args:
        num_heads: heads H of each memory.
        head_dim: key dims K of a head.
        value_head_dim: value dims V of a head; null is K.
        num_memories: memories M that the router chooses from.
        topk: memories A that a token is sent to.
        shared_memory: whether one more memory takes every token, with weight 1.
        conv_size: taps of the convolutions over q, k and v.
        balance_loss: coefficient of the balance loss of the router; 1 is balanced.
        norm_eps: of the output norm; null takes the model's.

    Raises:
        ConfigError: a size that is not positive, or more memories per token than there are.
    """

    kind: str = "mom"
    head_dim: int
    value_head_dim: int | None = None
    num_memories: int = 4
    topk: int = 2
    shared_memory: bool = True
    conv_size: int = 4
    balance_loss: float = 0.01
    norm_eps: float | None = None
    loss_names: ClassVar[tuple[str, ...]] = ("memory_balance",)

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "value_head_dim", "num_memories", "topk", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        require(self.topk <= self.num_memories, "topk", "must not exceed num_memories", got=self.topk,
                expected=f"at most {self.num_memories}")
        require(self.balance_loss >= 0, "balance_loss", "must not be negative", got=self.balance_loss)
        check_taps(self.conv_size)

    @property
    def value_dim(self) -> int:
        """Value dims V of a head."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def memories(self) -> int:
        """Memories E, the shared one included."""
        return self.num_memories + self.shared_memory

    @property
    def per_token(self) -> int:
        """Memories that see a token."""
        return self.topk + self.shared_memory

    @property
    def widths(self) -> dict[str, int]:
        """Channels of q, k and v of one memory."""
        keys = self.num_heads * self.head_dim
        return {"q": keys, "k": keys, "v": self.num_heads * self.value_dim}

    def _projection_params(self, context: LayerContext) -> int:
        keys, values = self.widths["k"], self.widths["v"]
        per_memory = keys + values + 2 * self.num_heads
        return context.hidden_size * (keys + self.memories * per_memory + self.num_memories + 2 * values)

    def own_losses(self) -> tuple[str, ...]:
        return self.loss_names if self.balance_loss else ()

    def num_params(self, context: LayerContext) -> int:
        vectors = 2 * self.num_heads + self.value_dim
        return self._projection_params(context) + self.conv_size * sum(self.widths.values()) + vectors

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Every memory's projections of every token: a token's values are then looked up, not sent and computed."""
        return {"projections": 2.0 * self._projection_params(context),
                "conv": 2.0 * self.conv_size * sum(self.widths.values()) * self.per_token,
                "recurrence": 7.0 * self.per_token * self.widths["v"] * self.head_dim}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the states in fp32 and of the inputs of convolutions in the dtype of the model, of all memories."""
        taps = element_bytes * (self.conv_size - 1) * sum(self.widths.values())
        return self.memories * (FP32_BYTES * self.widths["v"] * self.head_dim + taps)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: projections, and rows, convolutions and chunks per memory."""
        widths = sum(self.widths.values())
        chunk = self.num_heads * (self.head_dim * self.value_dim / CHUNK_TOKENS + 4 * CHUNK_TOKENS)
        rows = self.per_token * (4 * widths + chunk + self.widths["v"])
        return element_bytes * (context.hidden_size + 3 * self.widths["v"]) + FP32_BYTES * rows

    def check_context_parallel(self, shards: int, length: int) -> None:
        raise ConfigError("kind", "cannot work on split rows: only the data say how many tokens of a shard a memory "
                          "sees", got=self.kind, expected="engine.context_parallel=1")

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        data.pop("balance_loss")
        return data | {"value_head_dim": self.value_dim}


@dataclass
class Routing:
    """The place of each pair of a token and a memory among the packed rows.

    Args:
        token_R: the token of each row.
        memory_R: its memory.
        place_XA: the row of each pair, A with the shared memory.
        borders: of the rows of each document and memory, then of the rows of zeros.
        documents: number of documents N.
        zeros: number of rows of zeros, as many as a memory may see of one document, at most MAX_CHUNK_TOKENS.
    """

    token_R: Tensor
    memory_R: Tensor
    place_XA: Tensor
    borders: CuSeqlens
    documents: int
    zeros: int

    @classmethod
    def of(cls, ids_XA: Tensor, memories: int, seq: SequenceInfo) -> Routing:
        """Sort the pairs by document, memory and token.

        The rows of zeros behind them keep the chunks of the recurrence at one size, whatever the routing: the longest
        document decides it, and a token's arithmetic must not depend on where later tokens go.
        """
        document_X, documents = seq.documents()
        zeros = min(MAX_CHUNK_TOKENS, seq.positions_BT.shape[1])
        group_Y = (document_X[:, None] * memories + ids_XA).flatten()
        order_R = torch.argsort(group_Y, stable=True)
        count_G = torch.zeros(documents * memories, dtype=torch.int64, device=group_Y.device)
        count_G = count_G.index_add(0, group_Y, torch.ones_like(group_Y))
        ends_G = F.pad(F.pad(count_G, (0, 1), value=zeros).cumsum(0), (1, 0))
        place_Y = torch.empty_like(order_R)
        place_Y[order_R] = torch.arange(len(order_R), device=order_R.device)
        return cls(order_R // ids_XA.shape[1], ids_XA.flatten()[order_R], place_Y.view_as(ids_XA),
                   CuSeqlens.of(ends_G, ids_XA.device, len(order_R) + zeros), documents, zeros)

    def rows(self, x_XEC: Tensor) -> Tensor:
        """The rows [1, R + zeros, C] of x, [tokens, C] or one for each memory [tokens, E, C]."""
        x_RC = x_XEC[self.token_R] if x_XEC.dim() == 2 else x_XEC[self.token_R, self.memory_R]
        return F.pad(x_RC, (0, 0, 0, self.zeros))[None]


@register_mixer("mom", MoMConfig)
class MixtureOfMemories(TensorStateMixer):
    """Parameters: router [M, D]; q_proj [H K, D]; k_proj, v_proj, b_proj and a_proj with the rows of all E memories,
    the shared one last; q_conv, k_conv, v_conv; A_log and dt_bias [H]; g_proj [H V, D], o_norm [V], o_proj [D, H V].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "o_norm.weight")
    config: MoMConfig

    def __init__(self, config: MoMConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, E, widths = context.hidden_size, config.num_heads, config.memories, config.widths
        self.router = nn.Linear(D, config.num_memories, bias=False)
        self.q_proj = nn.Linear(D, widths["q"], bias=False)
        self.k_proj, self.v_proj = (nn.Linear(D, E * widths[name], bias=False) for name in "kv")
        self.b_proj, self.a_proj = (nn.Linear(D, E * H, bias=False) for _ in range(2))
        self.q_conv, self.k_conv, self.v_conv = (CausalConv(widths[name], config.conv_size, bias=False)
                                                 for name in "qkv")
        self.A_log, self.dt_bias = (nn.Parameter(torch.zeros(H)) for _ in range(2))
        self.g_proj = nn.Linear(D, widths["v"], bias=False)
        self.o_norm = GatedRMSNorm(config.value_dim, context.norm.eps_or(config.norm_eps), "silu")
        self.o_proj = nn.Linear(widths["v"], D, bias=False)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"memory_balance": self.config.balance_loss}

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        H, E = config.num_heads, config.memories
        x_XD = x_BTD.flatten(0, 1)
        weight_XA, ids_XA, aux = self._route(x_XD, seq)
        routing = Routing.of(ids_XA, E, seq)
        rows = {"q": routing.rows(self.q_proj(x_XD))}
        for name in ("k", "v", "b", "a"):
            rows[name] = routing.rows(getattr(self, f"{name}_proj")(x_XD).unflatten(-1, (E, -1)))
        packed = SequenceInfo.make(1, len(routing.token_R) + routing.zeros, x_BTD.device, routing.borders)
        kept = None if state is None else TensorState({name: _with_zeros(x) for name, x in state.tensors.items()})
        for name in "qkv":
            convolution = getattr(self, f"{name}_conv")
            rows[name] = convolution(rows[name], packed, kept, f"{name}_conv").unflatten(-1, (H, -1))
        o_1RHV, matrix = delta_rule(
            rows["q"], rows["k"], rows["v"], g=rows["a"], gate=Gate("softplus", self.A_log, self.dt_bias),
            beta=rows["b"], beta_sigmoid=1.0, qk_l2norm=True, cu_seqlens=routing.borders,
            initial_state=None if kept is None else kept.tensors.get("matrix"), final_state=state is not None)
        if state is not None and kept is not None:
            kept.tensors["matrix"] = matrix
            state.tensors = {name: x[:-1].unflatten(0, (routing.documents, E)) for name, x in kept.tensors.items()}
        o_XAHV = o_1RHV[0][routing.place_XA]
        o_XHV = (o_XAHV * weight_XA[..., None, None].to(o_XAHV.dtype)).sum(1)
        gate_XHV = self.g_proj(x_XD).unflatten(-1, (H, config.value_dim))
        return self.o_proj(self.o_norm(o_XHV, gate_XHV).flatten(-2)).view(*x_BTD.shape[:2], -1), aux

    def _route(self, x_XD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Tensor, Aux]:
        """Weights and memories [tokens, A] of each token, the shared one last, and the balance loss in training."""
        config = self.config
        logits_XM = self.router(x_XD)
        p_XM = logits_XM.softmax(-1, dtype=torch.promote_types(logits_XM.dtype, torch.float32))
        weight_XA, ids_XA = p_XM.topk(config.topk, -1)
        weight_XA = weight_XA / weight_XA.sum(-1, keepdim=True)
        aux: Aux = {}
        if self.training and config.balance_loss:
            aux["loss/memory_balance"] = balance_loss(p_XM, ids_XA, seq)
        if config.shared_memory:
            weight_XA, ids_XA = F.pad(weight_XA, (0, 1), value=1.0), F.pad(ids_XA, (0, 1), value=config.num_memories)
        return weight_XA, ids_XA, aux

    def head_rows(self) -> dict[str, int]:
        config = self.config
        every = config.memories * config.num_heads
        return {"q_proj": config.num_heads, "k_proj": every, "v_proj": every, "g_proj": config.num_heads}

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"router.weight": ParameterRole("router")}, self.head_rows())

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """A is uniform in 0 to 16, steps start log-uniform, as in Gated DeltaNet."""
        init_projections(self, std)
        for name in "qkv":
            getattr(self, f"{name}_conv").reset_parameters()
        init_log_uniform(self.A_log, *A_INIT)
        init_inverse_softplus(self.dt_bias, *DT_INIT)


def _with_zeros(x_NE: Tensor) -> Tensor:
    """The states [N E + 1, ...] of all memories, and that of the rows of zeros."""
    x = x_NE.flatten(0, 1)
    return torch.cat([x, torch.zeros_like(x[:1])])
