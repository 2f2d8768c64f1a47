"""Mamba and Longhorn: a selective scan inside a gated block, with N states for every channel.

    x, z = W_in u;   x = silu(conv(x));   (d, B, C) = W_x x;   dt = softplus(W_dt d + b)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;   y_t = C_t h_t + D x_t;   out = W_out (y * silu(z))

Longhorn takes beta = sigmoid(W_dt d + b), dt = beta / (1 + beta |B|^2) and the factor 1 - dt B^2 in place of exp(dt A).
Sources: Gu and Dao 2023 (Mamba), Liu et al. 2024 (Longhorn), Lieber et al. 2024 (Jamba), Zuo et al. 2024
(Falcon-Mamba).

B rows, T tokens, D hidden size, I inner channels, N states per channel, R rank of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps, check_taps_in_shards, conv_traffic
from hybridlm.model.mixers.common.init import init_inverse_softplus, init_projections
from hybridlm.model.mixers.common.memory import MEMORY
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind
from hybridlm_kernels import selective_scan

FP32_BYTES = 4  # bytes per element
DT_INIT = (1e-3, 1e-1)  # step sizes at the start are log-uniform between these


@dataclass(kw_only=True)
class MambaConfig(MixerConfig):
    """Configuration of Mamba and Longhorn.

    Args:
        rule: mamba, or longhorn, whose states are the closed form of an online regression (diagonal form).
        expand: inner channels I per dim of the model.
        state_size: states N per channel.
        conv_size: taps of the convolution in front of the scan, which has a bias and SiLU.
        dt_rank: rank R of the step; null is a sixteenth of the hidden size, rounded up.
        inner_norm: RMSNorm of the step, B and C before they are used: none (Mamba), plain without weights
            (Falcon-Mamba) or learned with weights (Jamba, Hymba).
        norm_eps: of the inner norm; null takes the model's.
        bias: whether in_proj and out_proj have a bias.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "mamba"
    rule: Literal["mamba", "longhorn"] = "mamba"
    expand: int = 2
    state_size: int = 16
    conv_size: int = 4
    dt_rank: int | None = None
    inner_norm: Literal["none", "plain", "learned"] = "none"
    norm_eps: float | None = None
    bias: bool = False
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("expand", "state_size", "dt_rank", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        check_taps(self.conv_size)

    def inner_size(self, context: LayerContext) -> int:
        """Inner channels I."""
        return self.expand * context.hidden_size

    def rank(self, context: LayerContext) -> int:
        """Rank R of the step."""
        return math.ceil(context.hidden_size / 16) if self.dt_rank is None else self.dt_rank

    def _projection_params(self, context: LayerContext) -> int:
        inner, rank = self.inner_size(context), self.rank(context)
        return inner * (3 * context.hidden_size + 2 * rank + 2 * self.state_size)

    def num_params(self, context: LayerContext) -> int:
        inner = self.inner_size(context)
        vectors = inner * (self.conv_size + 3)  # convolution with bias, bias of the step, D
        rates = inner * self.state_size if self.rule == "mamba" else 0
        norms = self.rank(context) + 2 * self.state_size if self.inner_norm == "learned" else 0
        biases = 2 * inner + context.hidden_size if self.bias else 0
        return self._projection_params(context) + vectors + rates + norms + biases

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The scan is counted as the paper writes it: factor, decay, input and output of every state."""
        inner = self.inner_size(context)
        return {"projections": 2.0 * self._projection_params(context), "conv": 2.0 * self.conv_size * inner,
                "recurrence": 7.0 * inner * self.state_size}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the states in fp32 and of the inputs of the convolution in the dtype of the model."""
        return self.inner_size(context) * (FP32_BYTES * self.state_size + element_bytes * (self.conv_size - 1))

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: inner tensors, B and C, and the states of some tokens in fp32."""
        inner = self.inner_size(context)
        states = self.state_size * inner / 16  # those before each block of tokens, 16 in the Triton kernel
        small = self.rank(context) + 4 * self.state_size
        return element_bytes * (context.hidden_size + 5 * inner + small) + FP32_BYTES * (3 * inner + states)

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_taps_in_shards(self.conv_size, length)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """Bytes of the inputs of the convolution, and in fp32 of the states of each shard and what it keeps of them."""
        inner = self.inner_size(context)
        states = 2 * rows * FP32_BYTES * inner * self.state_size
        return [*conv_traffic(rows, self.conv_size, inner, element_bytes), ShardTraffic("gather", states, states)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        return data if self.inner_norm != "none" else {key: value for key, value in data.items() if key != "norm_eps"}

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        return (MEMORY,)

    def shared_width(self, kind: SharedKind, context: LayerContext) -> int:
        return self.inner_size(context)


@register_mixer("mamba", MambaConfig)
class Mamba(TensorStateMixer):
    """Parameters: in_proj [2 I, D], conv, x_proj [R + 2 N, I], dt_proj [I, R], dt_bias and D [I], A_log [I, N] and
    out_proj [D, I]; dt_norm, B_norm and C_norm where the inner norm has weights.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias", "dt_norm.weight", "B_norm.weight",
                                                  "C_norm.weight")
    config: MambaConfig

    def __init__(self, config: MambaConfig, context: LayerContext):
        super().__init__()
        self.config = config
        hidden, inner, rank, states = (context.hidden_size, config.inner_size(context), config.rank(context),
                                       config.state_size)
        self.sizes = (rank, states, states)
        self.layer_index, self.memory_is_read = context.layer_index, context.is_read(MEMORY)
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=config.bias)
        self.conv = CausalConv(inner, config.conv_size)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(inner))
        self.D = nn.Parameter(torch.zeros(inner))
        if config.rule == "mamba":
            self.A_log = nn.Parameter(torch.zeros(inner, states))
        self.eps = context.norm.eps_or(config.norm_eps)
        if config.inner_norm == "learned":
            self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(size, self.eps) for size in self.sizes)
        self.out_proj = nn.Linear(inner, hidden, bias=config.bias)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        x_BTI, z_BTI = self.in_proj(x_BTD).chunk(2, -1)
        x_BTI = self.conv(x_BTI.contiguous(), seq, state)
        dt_BTR, B_BTN, C_BTN = self._normed(self.x_proj(x_BTI).split(self.sizes, -1))
        wide = torch.promote_types(x_BTI.dtype, torch.float32)
        u_BTI = self.dt_proj(dt_BTR).to(wide) + self.dt_bias
        if self.config.rule == "mamba":
            dt_BTI, A_IN = F.softplus(u_BTI), -self.A_log.to(wide).exp()
        else:
            beta_BTI = u_BTI.sigmoid()
            dt_BTI = beta_BTI / (1.0 + beta_BTI * B_BTN.to(wide).square().sum(-1, keepdim=True))
            A_IN = None
        scan = partial(selective_scan, dt_RTD=dt_BTI, A_DN=A_IN, B_RTN=B_BTN, C_RTN=C_BTN, cu_seqlens=seq.cu_seqlens)
        start = None if state is None else state.tensors.get("states")
        if seq.shard is not None:
            start = self._states_of_earlier_shards(scan, x_BTI, seq)
        y_BTI, states = scan(x_BTI, initial_state=start)
        if state is not None:
            state.tensors["states"] = states
        memory_BTI = (y_BTI + self.D * x_BTI).to(x_BTI.dtype)
        if self.memory_is_read:
            seq.leave(MEMORY, self.layer_index, memory_BTI)
        return self.out_proj(memory_BTI * F.silu(z_BTI)), {}

    def _normed(self, parts: tuple[Tensor, ...]) -> list[Tensor]:
        """The step, B and C after the inner norm, contiguous."""
        if self.config.inner_norm == "learned":
            norms = (self.dt_norm, self.B_norm, self.C_norm)
            return [norm(part) for norm, part in zip(norms, parts, strict=True)]
        if self.config.inner_norm == "plain":
            wide = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
            return [(w * torch.rsqrt(w.square().mean(-1, keepdim=True) + self.eps)).to(part.dtype)
                    for w, part in zip(wide, parts, strict=True)]
        return [part.contiguous() for part in parts]

    def _states_of_earlier_shards(self, scan: Any, x_BTI: Tensor, seq: SequenceInfo) -> Tensor:
        """The states [documents, I, N] before each document of this shard.

        The states at the end of the shard are linear in those at its start, and each is only multiplied: a scan from
        zero gives what the shard adds, one from ones without inputs what it keeps.
        """
        assert seq.shard is not None
        shard = seq.shard
        _, added = scan(x_BTI)
        ones_BIN = torch.ones_like(shard.at_end(added)) * shard.continues_B[:, None, None]
        _, kept = scan(torch.zeros_like(x_BTI), initial_state=shard.at_start(ones_BIN))
        incoming = shard.incoming(shard.at_end(added)[:, None], shard.at_end(kept)[:, None], torch.mul)
        return shard.at_start(incoming[:, 0])

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"A_log": VECTOR})

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Rates A are 1 .. N for every channel, D is 1, steps start log-uniform (Gu and Dao 2023, section 3.6)."""
        init_projections(self, std)
        self.conv.reset_parameters()
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        nn.init.ones_(self.D)
        if self.config.rule == "mamba":
            init_inverse_softplus(self.dt_bias, *DT_INIT)
            self.A_log.copy_(torch.arange(1.0, self.config.state_size + 1).log().expand_as(self.A_log))
        else:
            nn.init.uniform_(self.dt_bias, -bound, bound)
