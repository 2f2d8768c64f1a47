"""RWKV-7 (Goose): a delta rule with vectors for its decay, its removal key and its replacement rate.

    S_t = Diag(w_t) S_{t-1} - (a_t * p_t) (p_t^T S_{t-1}) + k_t v_t^T;   o_t = S_t^T r_t
    y_t = W_o (g_t * (norm(o_t) + (sum r_t * u * k_t) v_t))                norm over each head
    w = exp(-e^{-1/2} sigmoid(w0 + W_b tanh(W_a x_w)));   a, g and the share of v of the first layer: low-rank maps of x
    p = (k * c) / |k * c|;   k := k * (1 + (a - 1) * d);   v := v + (v_first - v) * share

p reads the state before it decays. v_first are the values of the first such layer of the model, to which gradients
pass. Every projection reads the token mixed with the one before it.

Source: Peng et al. 2025 (RWKV-7 Goose), section 4, and the authors' code (RWKV-LM, RWKV-v7).
B rows, T tokens, D hidden size, H heads, K dims per head, C = H K channels, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import ConfigError, require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.attention_weights import spread_over_heads, take_attention_projections
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.matrix_state import run_over_shards
from hybridlm.model.mixers.common.rwkv import channel_ramp, depth_ratio
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.token_shift import lerp_with_previous, previous_tokens
from hybridlm.model.mixers.contract import Aux, MixerConfig, SequenceMixer, register_mixer
from hybridlm.model.norm import HeadGroupNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind, SharedRead
from hybridlm_kernels import delta_rule
from hybridlm_kernels.precision import wide

FP32_BYTES = 4  # bytes per element
CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations
NORM_EPS = 64e-5
DECAY_SCALE = -math.exp(-0.5)  # the logarithm of the decay lies between this and 0
INPUTS = "rwkvag"  # letters of the mixed inputs, in the order of the rows of `mix`
MIX_EXPONENTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
RANK_FACTORS = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}  # times the root of the hidden size

FIRST_VALUES = SharedKind("the values of the first rwkv7 layer", gradient=True)
READ_FIRST_VALUES = SharedRead(FIRST_VALUES, option="kind")


@dataclass(kw_only=True)
class RWKV7Config(StateHeadsConfig):
    """Configuration of the time mix of RWKV-7.

    A rank of null is the authors' suggestion, a multiple of 32 near 2.5 sqrt(D) for decay and rate, 1.7 sqrt(D) for the
    share of the first values, 5 sqrt(D) for the gate. Published files differ: read theirs from the tensors.

    Args:
        num_heads: heads H.
        head_dim: dims K of a head, for keys and values.
        decay_rank: rank of the map from the token to its decay.
        rate_rank: rank of the map to its replacement rate a.
        value_rank: rank of the map to its share of the first layer's values; not in the first layer.
        gate_rank: rank of the output gate.

    Raises:
        ConfigError: a size that is not positive, or unlike sizes of two layers of the kind.
    """

    kind: str = "rwkv7"
    num_heads: int
    head_dim: int
    decay_rank: int | None = None
    rate_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "decay_rank", "rate_rank", "value_rank", "gate_rank"):
            size = getattr(self, key)
            require(size is None or size > 0, key, "must be positive", got=size)

    @property
    def channels(self) -> int:
        """Channels C = H K of each projection."""
        return self.num_heads * self.head_dim

    def ranks(self, context: LayerContext) -> dict[str, int]:
        """Rank of each low-rank map of the layer; the first layer of the kind has none for its values."""
        names = [name for name in RANK_FACTORS if name != "value" or self.reads(context)]
        return {name: getattr(self, f"{name}_rank") or suggest_rank(RANK_FACTORS[name], context.hidden_size)
                for name in names}

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        return () if self.reads(context) else (FIRST_VALUES,)

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        try:
            source = context.source_of(READ_FIRST_VALUES)
        except ConfigError:  # no earlier layer of the kind: this is the first
            return ()
        first = context.mixers[context.layers[source]]
        if isinstance(first, RWKV7Config):
            require(first.channels == self.channels, "num_heads", f"has other channels than layer {source}, whose "
                    "values all rwkv7 layers read", got=self.channels, expected=str(first.channels))
        return (READ_FIRST_VALUES,)

    def _matrix_params(self, context: LayerContext) -> int:
        D, C = context.hidden_size, self.channels
        return 4 * D * C + (D + C) * sum(self.ranks(context).values())

    def num_params(self, context: LayerContext) -> int:
        # decay, rate, key scale, key rate, bonus, weight and bias of the norm; the share of the first values
        vectors = 7 + len(self.reads(context))
        return self._matrix_params(context) + len(INPUTS) * context.hidden_size + vectors * self.channels

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it, with the bonus of the token itself."""
        return {"projections": 2.0 * self._matrix_params(context),
                "recurrence": self.channels * (9.0 * self.head_dim + 5.0)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the state in fp32, and of the last token."""
        return FP32_BYTES * self.channels * self.head_dim + element_bytes * context.hidden_size

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: mixed inputs, what makes keys and gates, and the operation's."""
        D, C = context.hidden_size, self.channels
        ranks = sum(self.ranks(context).values())
        return element_bytes * (8 * D + 20 * C + 1.5 * ranks) + FP32_BYTES * C * (6 + self.head_dim / CHUNK_TOKENS)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: the recurrence is linear in its state, and the shift needs one token."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """Bytes of the last token, and in fp32 of the state and the transition of each shard."""
        tail = rows * element_bytes * context.hidden_size
        state = rows * FP32_BYTES * 2 * self.channels * self.head_dim
        return [ShardTraffic("from_previous", tail, tail), ShardTraffic("gather", state, state)]

    attention_weights: ClassVar[tuple[str, ...]] = tuple(f"{name}_proj.weight" for name in "rkvo")

    def initial_weights_from(self, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig) -> dict[str, Tensor]:
        """Take q as the receptance, k, v and o, where heads and dims fit (ARWKV)."""
        heads = (self.num_heads, self.head_dim)
        found = take_attention_projections(old, tensors, dict.fromkeys(("q_proj", "k_proj", "v_proj"), heads), norm)
        return {name.replace("q_proj", "r_proj"): weight for name, weight in found.items()}


def suggest_rank(factor: float, hidden_size: int) -> int:
    """The authors' suggestion for the rank of a low-rank map.

    >>> suggest_rank(2.5, 768), suggest_rank(5.0, 768)
    (64, 128)
    """
    return max(32, 32 * round(factor * hidden_size**0.5 / 32))


@register_mixer("rwkv7", RWKV7Config)
class RWKV7(SequenceMixer):
    """Parameters: r_proj, k_proj, v_proj [C, D], o_proj [D, C], mix [6, D]; decay, rate, key_scale, key_rate [C], bonus
    [H, K]; {decay, rate, gate}_a_proj [R, D] and _b_proj [C, R]; o_norm. Beyond the first layer of the kind also
    value_share [C], value_a_proj and value_b_proj.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("mix", "decay", "rate", "key_scale", "key_rate", "bonus",
                                                 "value_share", "o_norm.weight", "o_norm.bias")
    config: RWKV7Config

    def __init__(self, config: RWKV7Config, context: LayerContext):
        super().__init__()
        self.config = config
        self.ratios = depth_ratio(context)
        self.layer_index = context.layer_index
        self.source = context.source_of(READ_FIRST_VALUES) if config.reads(context) else None
        self.values_are_read = context.is_read(FIRST_VALUES)
        D, C = context.hidden_size, config.channels
        self.r_proj, self.k_proj, self.v_proj = (nn.Linear(D, C, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(C, D, bias=False)
        self.mix = nn.Parameter(torch.zeros(len(INPUTS), D))
        self.decay, self.rate, self.key_scale, self.key_rate = (nn.Parameter(torch.zeros(C)) for _ in range(4))
        self.bonus = nn.Parameter(torch.zeros(config.num_heads, config.head_dim))
        if self.source is not None:
            self.value_share = nn.Parameter(torch.zeros(C))
        self.low_rank_names = tuple(config.ranks(context))
        for name, rank in config.ranks(context).items():
            setattr(self, f"{name}_a_proj", nn.Linear(D, rank, bias=False))
            setattr(self, f"{name}_b_proj", nn.Linear(rank, C, bias=False))
        self.o_norm = HeadGroupNorm(config.num_heads, C, NORM_EPS)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config, dtype = self.config, x_BTD.dtype
        before_BTD = previous_tokens(x_BTD, seq, state)
        x = {name: lerp_with_previous(x_BTD, before_BTD, mix_D).to(dtype)
             for name, mix_D in zip(INPUTS, self.mix, strict=True)}
        r_BTC, k_BTC, v_BTC = self.r_proj(x["r"]), self.k_proj(x["k"]), self.v_proj(x["v"])
        if self.values_are_read and self.source is None:
            seq.leave(FIRST_VALUES, self.layer_index, v_BTC)
        if self.source is not None:
            share_BTC = (self.value_share + wide(self._low_rank("value", x["v"]))).sigmoid()
            v_BTC = torch.lerp(wide(v_BTC), wide(seq.read(FIRST_VALUES, self.source)), share_BTC).to(dtype)
        g_BTC = DECAY_SCALE * (self.decay + wide(self._low_rank("decay", x["w"], torch.tanh))).sigmoid()
        a_BTC = (self.rate + wide(self._low_rank("rate", x["a"]))).sigmoid()
        heads = (config.num_heads, config.head_dim)
        p_BTHK = F.normalize((wide(k_BTC) * self.key_scale).unflatten(-1, heads), dim=-1)
        k_BTC = (wide(k_BTC) * (1 + (a_BTC - 1) * self.key_rate)).to(dtype)
        r_BTHK, k_BTHK, v_BTHK, g_BTHK = (y.unflatten(-1, heads) for y in (r_BTC, k_BTC, v_BTC, g_BTC))
        erased_BTHK = -p_BTHK * a_BTC.unflatten(-1, heads)
        rule: Callable[..., tuple[Tensor, Tensor]] = partial(
            delta_rule, r_BTHK, k_BTHK, g=g_BTHK, erase_key=p_BTHK.to(dtype), erase_vector=erased_BTHK.to(dtype),
            erase_before_decay=True, scale=1.0, cu_seqlens=seq.cu_seqlens)
        if seq.shard is not None:
            o_BTHK = run_over_shards(rule, v_BTHK, config.head_dim, seq.shard)
        else:
            start = None if state is None else state.tensors.get("matrix")
            o_BTHK, matrix_NHKK = rule(v_BTHK, initial_state=start, final_state=state is not None)
            if state is not None:
                state.tensors["matrix"] = matrix_NHKK
        own_BTH1 = (wide(r_BTHK) * self.bonus * wide(k_BTHK)).sum(-1, keepdim=True)
        y_BTC = self.o_norm(o_BTHK.flatten(-2)) + (own_BTH1 * wide(v_BTHK)).flatten(-2).to(dtype)
        return self.o_proj(y_BTC * self._low_rank("gate", x["g"], torch.sigmoid)), {}

    def _low_rank(self, name: str, x_BTD: Tensor, act: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The low-rank map `name` of an input [B, T, D], with an activation between its two matrices: [B, T, C]."""
        low_BTR = getattr(self, f"{name}_a_proj")(x_BTD)
        return getattr(self, f"{name}_b_proj")(low_BTR if act is None else act(low_BTR))

    def head_rows(self) -> dict[str, int]:
        names = ("r_proj", "k_proj", "v_proj", *(f"{name}_b_proj" for name in self.low_rank_names))
        return dict.fromkeys(names, self.config.num_heads)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"mix": VECTOR, "bonus": VECTOR}, self.head_rows())

    def new_state(self, batch: int, max_length: int) -> TensorState:
        return TensorState()

    def output_projection(self) -> tuple[nn.Linear, int]:
        return self.o_proj, self.config.num_heads

    @torch.no_grad()
    def calibrate(self, half_life_H: Tensor) -> None:
        """No token shift, decays constant per head, no values of the first layer, an output gate of 1."""
        self.mix.zero_()
        half_life_H = spread_over_heads(half_life_H.double(), self.config.num_heads)
        share_H = (math.log(2) / half_life_H / -DECAY_SCALE).clamp(max=0.999)
        self.decay.copy_(torch.logit(share_H).repeat_interleave(self.config.head_dim))
        if self.source is not None:
            self.value_share.fill_(-5.0)
        gate_CR: Tensor = getattr(self, "gate_b_proj").weight  # noqa: B009  (set by name) its inputs start at 1/2
        gate_CR += (2.0 - gate_CR.sum(1, keepdim=True)) / gate_CR.shape[1]

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Ramps over channels and layers, as in the authors' code (RWKV-LM, x070); `std` is not used there."""
        init_projections(self, std)
        (r01, r10), K = self.ratios, self.config.head_dim
        C, D = self.decay.shape[0], self.mix.shape[1]
        place = torch.arange(C, dtype=torch.float32) / max(C - 1, 1)
        linear = place - 0.5
        inside = (torch.arange(C, dtype=torch.float32) % K) / max(K - 1, 1) * 2 - 1  # -1 to 1 inside each head
        zigzag = inside * inside.abs()
        self.decay.copy_(-6.0 + 6.0 * place ** (1.0 + r01**0.3) + 0.5 + 2.5 * zigzag)
        self.rate.copy_(-0.19 + 0.3 * zigzag + 0.4 * linear)
        self.key_scale.copy_(0.71 - 0.1 * linear)
        nn.init.constant_(self.key_rate, 1.02)
        nn.init.constant_(self.bonus, -0.04)
        if self.source is not None:
            self.value_share.copy_(0.73 - 0.4 * linear)
        ramp_D = channel_ramp(D)
        self.mix.copy_(torch.stack([1.0 - ramp_D ** (MIX_EXPONENTS[name] * r10) for name in INPUTS]))
        for name in self.low_rank_names:
            nn.init.zeros_(getattr(self, f"{name}_a_proj").weight)
            weight_CR = getattr(self, f"{name}_b_proj").weight
            channels, rank = weight_CR.shape
            nn.init.orthogonal_(weight_CR, gain=0.1 * max(1.0, rank / channels) ** 0.5)
        for projection, scale in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(projection.weight, -scale * D**-0.5, scale * D**-0.5)
        nn.init.zeros_(self.o_proj.weight)
