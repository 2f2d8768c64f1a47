"""Base of linear mixers: projections, short convolutions, forget gate, output norm and gate, decode state.

B rows, T tokens, D hidden size, H key heads, HV value heads, K key dim, V value dim, W taps of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import RecurrentState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.attention_weights import spread_over_heads, take_attention_projections
from hybridlm.model.mixers.common.convolution import check_taps, check_taps_in_shards
from hybridlm.model.mixers.common.cost import count_low_rank_params
from hybridlm.model.mixers.common.init import (
    init_conv,
    init_identity_conv,
    init_inverse_softplus,
    init_log_uniform,
    init_projections,
)
from hybridlm.model.mixers.contract import MixerConfig, SequenceMixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import GatedRMSNorm, RMSNorm, WeightlessRMSNorm, activate_gate
from hybridlm.model.parameter_roles import CONVOLUTION, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import Gate, short_conv

FP32_BYTES = 4  # bytes per element
CHUNK_TOKENS = 32  # tokens per chunk of the operations, assumed by the estimate of activations


@dataclass(kw_only=True)
class RecurrentConfig(MixerConfig):
    """Configuration that all linear mixers share.

    The forget gate, for `decay` scalar or channel, takes u = f(x) + dt_bias:
        softplus       g = -exp(A_log) softplus(u)                  (Mamba-2, Gated DeltaNet, KDA)
        lower_bounded  g = lower_bound * sigmoid(exp(A_log) u)      (GLM-5.3, Ling 3.0)

    Args:
        num_heads: query and key heads H.
        head_dim: their dims K.
        num_value_heads: value heads HV, a multiple r of H; null is H. Key head j serves value heads j r .. j r + r - 1.
        value_head_dim: their dims V; null is K.
        decay: none, constant per head, or from x: scalar (one per value head) or channel (one per key channel).
        gate: form of the forget gate.
        gate_rank: rank of f for channel decay; null is one full projection.
        gate_dtype: `model` rounds g to the dtype of x (Ling 3.0).
        lower_bound: of the form lower_bounded.
        a_init: A_log starts as log U(low, high).
        dt_bias_init: start of dt_bias; inverse_softplus makes step sizes log-uniform in `dt_init`.
        dt_init: see there.
        conv_size: taps of the convolutions over q, k and v, which SiLU follows; 0 has none.
        output_gate: activation of the gate g(x) on the normalised output; linear has none.
        output_gate_rank: rank of g; null is one full projection.
        norm_eps: of the output norm; null takes the model's.
    """

    num_heads: int
    head_dim: int
    num_value_heads: int | None = None
    value_head_dim: int | None = None
    decay: Literal["none", "constant", "scalar", "channel"] = "channel"
    gate: Literal["softplus", "lower_bounded", "logsigmoid"] = "softplus"
    gate_rank: int | None = None
    gate_dtype: Literal["fp32", "model"] = "fp32"
    lower_bound: float = -5.0
    a_init: tuple[float, float] = (1.0, 16.0)
    dt_bias_init: Literal["ones", "zeros", "inverse_softplus"] = "inverse_softplus"
    dt_init: tuple[float, float] = (1e-3, 1e-1)
    conv_size: int = 0
    output_gate: Literal["none", "silu", "sigmoid", "linear"] = "silu"
    output_gate_rank: int | None = None
    norm_eps: float | None = None
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "num_value_heads", "value_head_dim", "gate_rank", "output_gate_rank",
                    "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        require(self.value_heads % self.num_heads == 0, "num_value_heads", "must be a multiple of num_heads",
                got=self.num_value_heads, expected=f"a multiple of {self.num_heads}")
        require(self.gate_rank is None or self.decay == "channel", "gate_rank", "needs decay=channel",
                got=self.gate_rank, expected="null", hint=f"decay={self.decay} has at most one gate per head")
        check_taps(self.conv_size, optional=True)
        require(self.output_gate_rank is None or self.output_gate != "none", "output_gate_rank", "needs an output gate",
                got=self.output_gate_rank, expected="null with output_gate=none")
        require(self.lower_bound < 0, "lower_bound", "must be negative: it bounds the logarithm of the decay",
                got=self.lower_bound)
        for key, (low, high) in (("a_init", self.a_init), ("dt_init", self.dt_init)):
            require(0 <= low <= high and high > 0, key, "must be a positive range", got=[low, high],
                    expected="[low, high]")

        require(self.output_gate != "linear" or not self.has_weighted_norm(), "output_gate",
                "is linear only behind a norm without a weight, or without a norm", got=self.output_gate,
                expected="silu, sigmoid or none")

    def has_weighted_norm(self) -> bool:
        """Whether the output norm has a weight."""
        return True

    @property
    def value_heads(self) -> int:
        return self.num_heads if self.num_value_heads is None else self.num_value_heads

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def channels(self) -> dict[str, int]:
        """Width of the q, k and v projections."""
        keys = self.num_heads * self.head_dim
        return {"q": keys, "k": keys, "v": self.output_width}

    @property
    def output_width(self) -> int:
        """Width of the recurrence's output: value heads times their dims."""
        return self.value_heads * self.value_dim

    @property
    def gate_width(self) -> int:
        """Outputs of the forget gate's projection."""
        return {"scalar": self.value_heads, "channel": self.value_heads * self.head_dim}.get(self.decay, 0)

    @property
    def has_a_log(self) -> bool:
        return self.gate_width > 0 and self.gate != "logsigmoid"

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_taps_in_shards(self.conv_size, length)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """Bytes of the inputs of convolutions, and in fp32 of the state and the transition of each shard."""
        tail = rows * max(self.conv_size - 1, 0) * context.hidden_size * element_bytes
        state = rows * 4 * (self.value_heads * self.head_dim * self.value_dim + self._shard_transition_size())
        found = [ShardTraffic("from_previous", tail, tail), ShardTraffic("gather", state, state)]
        return found if tail else found[1:]

    def _shard_transition_size(self) -> int:
        """Elements of the transition by which a shard of a row maps the state at its start to that at its end."""
        return {"none": 1, "channel": self.value_heads * self.head_dim}.get(self.decay, self.value_heads)

    def _projection_params(self, context: LayerContext) -> int:
        """Weights of the projections that every linear mixer has."""
        D = context.hidden_size
        out = self.output_width
        count = D * (sum(self.channels.values()) + out)
        count += count_low_rank_params(D, self.gate_width, self.gate_rank)
        return count + count_low_rank_params(D, 0 if self.output_gate == "none" else out, self.output_gate_rank)

    def num_params(self, context: LayerContext) -> int:
        count = self._projection_params(context) + self.conv_size * sum(self.channels.values())
        return count + self.gate_width + self.value_heads * self.has_a_log

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it; chunked kernels do more, but not more useful work."""
        return {"projections": 2.0 * self._projection_params(context),
                "conv": 2.0 * self.conv_size * sum(self.channels.values()),
                "recurrence": float(self.value_heads * self.head_dim * self.value_dim * self._flops_per_state_entry())}

    def _flops_per_state_entry(self) -> int:
        """FLOPs per token and element of the state."""
        return 4 + (self.decay != "none")

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the state matrix and of the inputs of convolutions, both in fp32 under any dtype of the model."""
        taps = max(self.conv_size - 1, 0) * sum(self.channels.values())
        return 4 * (self.value_heads * self.head_dim * self.value_dim + taps)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass, all in fp32 whatever `element_bytes` is.

        They are the inputs and outputs of each convolution, the chunked q, k and v in two forms, the gate, one state
        and one [chunk, chunk] matrix per chunk and head, and the outputs before and after their norm.
        """
        widths, values = sum(self.channels.values()), self.output_width
        convolution = (2 if self.conv_size else 1) * widths
        chunk = self.value_heads * (self.head_dim * self.value_dim / CHUNK_TOKENS + 2 * CHUNK_TOKENS)
        outputs = (2 if self.output_gate == "none" else 3) * values
        return FP32_BYTES * (convolution + 2 * widths + 2 * self.gate_width + chunk + outputs)

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        for key in ("a_init", "dt_bias_init", "dt_init"):  # they say how weights start
            data.pop(key)
        data["num_value_heads"] = self.value_heads
        data["value_head_dim"] = self.value_dim
        void = [] if self.gate_width else ["gate", "gate_dtype"]
        if self.gate != "lower_bounded" or not self.gate_width:
            void.append("lower_bound")
        return {key: value for key, value in data.items() if key not in void}

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Heads of the nearest mixer; its value heads and dims too, where it is a linear mixer."""
        other = model.nearest_mixer(cls)
        heads = model.heads_for(cls)
        sizes: dict[str, Any] = {"num_heads": heads.num_heads, "head_dim": heads.head_dim}
        if isinstance(other, RecurrentConfig) and "num_heads" not in options and "head_dim" not in options:
            sizes |= {"num_value_heads": other.num_value_heads, "value_head_dim": other.value_head_dim}
        return sizes

    def state_heads(self) -> int:
        return self.num_heads

    def with_state_heads(self, count: int) -> Self:
        per_head = self.value_heads // self.num_heads
        return replace(self, num_heads=count,
                       num_value_heads=None if self.num_value_heads is None else count * per_head)

    def initial_weights_from(self, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig) -> dict[str, Tensor]:
        """Take q, k, v and o projections of softmax attention, where heads and dims fit.

        Grouped keys and values are repeated for the heads that shared them.
        """
        wanted = {"q_proj": (self.num_heads, self.head_dim), "k_proj": (self.num_heads, self.head_dim),
                  "v_proj": (self.value_heads, self.value_dim)}
        return take_attention_projections(old, tensors, wanted, norm)

    def calibrated_form(self) -> Self:
        """The same mixer with a sigmoid output gate in place of silu, which is closed or random but never open."""
        return replace(self, output_gate="sigmoid") if self.output_gate == "silu" else self


class RecurrentMixer(SequenceMixer):
    """Base of linear mixers.

    Parameters: q_proj, k_proj, v_proj, o_proj; q_conv, k_conv, v_conv [channels, W]; forget gate a_proj (scalar),
    f_proj or f_a_proj and f_b_proj (channel), A_log [HV], dt_bias [HV] or [HV * K]; output g_proj or g_a_proj and
    g_b_proj; o_norm.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "o_norm.weight")
    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D = context.hidden_size
        channels = config.channels
        for name, width in channels.items():
            setattr(self, f"{name}_proj", nn.Linear(D, width, bias=False))
        if config.conv_size:
            for name, width in channels.items():
                setattr(self, f"{name}_conv", nn.Parameter(torch.zeros(width, config.conv_size)))
        if config.gate_width:
            self._add_projection("a" if config.decay == "scalar" else "f", D, config.gate_width, config.gate_rank)
            self.dt_bias = nn.Parameter(torch.zeros(config.gate_width))
        if config.has_a_log:
            self.A_log = nn.Parameter(torch.zeros(config.value_heads))
        if config.output_gate != "none":
            self._add_projection("g", D, config.output_width, config.output_gate_rank)
        self.o_proj = nn.Linear(config.output_width, D, bias=False)

    def _add_projection(self, name: str, inputs: int, outputs: int, rank: int | None) -> None:
        if rank is None:
            setattr(self, f"{name}_proj", nn.Linear(inputs, outputs, bias=False))
        else:
            setattr(self, f"{name}_a_proj", nn.Linear(inputs, rank, bias=False))
            setattr(self, f"{name}_b_proj", nn.Linear(rank, outputs, bias=False))

    def _project(self, name: str, x_BTD: Tensor, rank: int | None) -> Tensor:
        if rank is None:
            return getattr(self, f"{name}_proj")(x_BTD)
        return getattr(self, f"{name}_b_proj")(getattr(self, f"{name}_a_proj")(x_BTD))

    def build_output_norm(self, dim: int, context: LayerContext,
                          weight: bool = True) -> RMSNorm | GatedRMSNorm | WeightlessRMSNorm:
        """The norm of the output over `dim` dims, gated as the config says, with a weight per dim or without."""
        config = self.config
        eps = context.norm.eps_or(config.norm_eps)
        if not weight:
            return WeightlessRMSNorm(eps, None if config.output_gate == "none" else config.output_gate)
        if config.output_gate == "none":
            return RMSNorm(dim, eps)
        return GatedRMSNorm(dim, eps, "silu" if config.output_gate == "silu" else "sigmoid")

    def project_inputs(self, x_BTD: Tensor, seq: SequenceInfo, state: RecurrentState | None) -> Iterator[Tensor]:
        """Project and convolve the input: yields q, k and v [B, T, channels], one after the other.

        Args:
            x_BTD: input of the mixer.
            seq: borders of documents, at which convolutions start anew.
            state: decode state, whose convolution inputs are continued and updated.
        """
        taps = self.config.conv_size
        conv = {} if state is None else state.separate_conv(self.config.channels)
        shard = seq.shard if taps else None
        before_BXD = None if shard is None else shard.tail(x_BTD, taps - 1)
        for name in self.config.channels:
            project = getattr(self, f"{name}_proj")
            y_BTC = project(x_BTD)
            if taps:
                start = conv.get(name)
                if shard is not None:
                    start = shard.at_start(project(before_BXD).mT)
                y_BTC, inputs = short_conv(y_BTC, getattr(self, f"{name}_conv"), activation="silu",
                                           cu_seqlens=seq.cu_seqlens, initial_state=start)
                conv[name] = inputs
            yield y_BTC

    def project_forget_gate(self, x_BTD: Tensor) -> Tensor:
        """Project the input of the forget gate, f(x): [B, T, HV] for scalar decay, [B, T, HV, K] for channel decay."""
        config = self.config
        u = self._project("a" if config.decay == "scalar" else "f", x_BTD, config.gate_rank)
        return u if config.decay == "scalar" else u.unflatten(-1, (config.value_heads, config.head_dim))

    def build_forget_gate(self) -> Gate:
        """Make the forget gate of the config from this layer's parameters."""
        config = self.config
        dt_bias = self.dt_bias if config.decay == "scalar" else self.dt_bias.view(config.value_heads, config.head_dim)
        return Gate(config.gate, self.A_log if config.has_a_log else None, dt_bias, config.lower_bound)

    def prepare_decay(self, u: Tensor, dtype: torch.dtype) -> tuple[Tensor, Gate | None]:
        """Prepare the arguments `g` and `gate` of the operation, which computes the decay from them in fp32.

        Args:
            u: f(x) from `project_forget_gate`.
            dtype: that of x. With `gate_dtype: model` the decay is computed here, rounded to it, and there is no gate.
        """
        gate = self.build_forget_gate()
        if self.config.gate_dtype == "model":
            return gate.log_decay(u).to(dtype), None
        return u, gate

    def project_output(self, o_BTHvV: Tensor, x_BTD: Tensor, norm: RMSNorm | GatedRMSNorm | WeightlessRMSNorm | None,
                       all_heads: bool) -> Tensor:
        """Compute the output of the mixer [B, T, D]: norm, output gate and o_proj.

        Args:
            o_BTHvV: outputs of the recurrence.
            x_BTD: input of the mixer, from which the output gate is projected.
            norm: the output norm; None: none.
            all_heads: whether the norm is over all heads together; else over each head.
        """
        config = self.config
        o = o_BTHvV.flatten(-2) if all_heads else o_BTHvV
        if config.output_gate == "none":
            o = o if norm is None else norm(o)
        else:
            gate = self._project("g", x_BTD, config.output_gate_rank)
            gate = gate if all_heads else gate.unflatten(-1, (config.value_heads, config.value_dim))
            if norm is None:
                o = o * activate_gate(gate, config.output_gate)
            else:
                o = norm(o, gate)
        return self.o_proj(o if all_heads else o.flatten(-2))

    def head_rows(self) -> dict[str, int]:
        heads, value_heads = self.config.num_heads, self.config.value_heads
        return {"q_proj": heads, "k_proj": heads, "v_proj": value_heads, "f_proj": value_heads,
                "f_b_proj": value_heads, "g_proj": value_heads, "g_b_proj": value_heads}

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return self.find_roles({})

    def find_roles(self, declared: Mapping[str, ParameterRole]) -> dict[str, ParameterRole]:
        """The role of every parameter; `declared` are those of a kind that shapes do not say."""
        convolutions = {f"{name}_conv": CONVOLUTION for name in self.config.channels}
        return find_roles(self, {**convolutions, **declared}, self.head_rows())

    @property
    def decodes_padded_rows(self) -> bool:
        return True  # the state is a function of the row alone

    def new_state(self, batch: int, max_length: int) -> RecurrentState:
        return RecurrentState()

    def output_projection(self) -> tuple[nn.Linear, int]:
        return self.o_proj, self.config.value_heads

    @torch.no_grad()
    def calibrate(self, half_life_H: Tensor) -> None:
        """Convolutions become the identity, the decay a constant per head, a sigmoid output gate 1/2.

        Gates keep their first matrix where they have two, so gradients reach both.
        """
        config = self.config
        if config.conv_size:
            for name in config.channels:
                init_identity_conv(getattr(self, f"{name}_conv"))
        if config.output_gate == "sigmoid":
            self._last_projection("g", config.output_gate_rank).weight.zero_()
        if not config.gate_width:
            return
        self._last_projection("a" if config.decay == "scalar" else "f", config.gate_rank).weight.zero_()
        if config.has_a_log:
            self.A_log.zero_()
        decay_H = math.log(2) / spread_over_heads(half_life_H.double(), config.value_heads)
        bias_H = self.build_forget_gate().inverse(decay_H)
        self.dt_bias.copy_(bias_H.repeat_interleave(config.gate_width // config.value_heads))

    def _last_projection(self, name: str, rank: int | None) -> nn.Linear:
        """The matrix of a gate that its output comes from."""
        return getattr(self, f"{name}_proj" if rank is None else f"{name}_b_proj")

    def init_weights(self, std: float) -> None:
        config = self.config
        init_projections(self, std)
        if config.conv_size:
            for name in config.channels:
                init_conv(getattr(self, f"{name}_conv"))
        if config.has_a_log:
            init_log_uniform(self.A_log, *config.a_init)
        if config.gate_width and config.dt_bias_init == "inverse_softplus":
            init_inverse_softplus(self.dt_bias, *config.dt_init)
        elif config.gate_width:
            nn.init.constant_(self.dt_bias, 1.0 if config.dt_bias_init == "ones" else 0.0)
