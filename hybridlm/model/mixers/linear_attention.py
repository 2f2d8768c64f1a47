"""Linear attention with decay and no delta rule: Lightning, RetNet, Mamba-2 form, gated linear attention.

    S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T;   o_t = scale * S_t^T q_t,   q = phi(W_q x), k = phi(W_k x)
    y_t = W_o (norm(o_t) * act(W_g x_t))

Sources: Katharopoulos et al. 2020, RetNet 2023, TransNormerLLM 2023, MiniMax-01 2025 (Lightning attention), Mamba-2
2024, GLA 2023.
B rows, T tokens, D hidden size, H key heads, HV value heads, K key dim, V value dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.context_parallel import RowShard
from hybridlm.model.decode_state import RecurrentState
from hybridlm.model.decode_step import DecodeStep
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.attention_weights import spread_over_heads
from hybridlm.model.mixers.common.learned_rotation import published_angles, with_learned_angles
from hybridlm.model.mixers.common.matrix_state import compute_decay_from_start, read_incoming_state
from hybridlm.model.mixers.common.recurrent import CHUNK_TOKENS, FP32_BYTES, RecurrentConfig, RecurrentMixer
from hybridlm.model.mixers.common.recurrent_step import (
    decode_log_decay,
    prepare_forget_gate,
    prepare_inputs,
    prepare_output,
    state_matrix,
)
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole
from hybridlm.model.rope import RopeConfig, retnet_rotate, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import Gate, linear_attention
from hybridlm_kernels.decoding import linear_attention_step
from hybridlm_kernels.recurrence.gates import log_decay


@dataclass(kw_only=True)
class LinearAttentionConfig(RecurrentConfig):
    """Configuration of linear attention; the options it shares with others are those of `RecurrentConfig`.

    Args:
        decay: none, constant (by `slopes`), scalar (Mamba-2) or channel (GLA).
        gate: form of the forget gate; besides the common ones logsigmoid, g = logsigmoid(u) / gate_normalizer (GLA).
        gate_normalizer: divisor of that form.
        slopes: of head h in layer l of L. lightning: 2^(-8 (h+1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5); alibi: the
            same but for H that is no power of two, where heads follow ALiBi (TransNormerLLM); retnet:
            -log(1 - 2^(-5-h)); stored: numbers that are kept with the weights and do not train, at first those of
            lightning.
        feature_map: phi of q and k.
        value_map: psi of v.
        qk_norm: RMSNorm of each head of q and k, before the feature map (MiniCPM-SALA).
        rotation: of q and k by their positions: none; rope, as `rope` says (MiniCPM-SALA); retnet, neighbouring pairs
            at fixed frequencies; or learned, a learned angle per head and dim, with which keys have twice the dims in
            the state (LRPE-d).
        rope: rotary embedding, with rotation rope.
        rotated_layers: layers that have the learned rotation, counted from 0 (TransNormerLLM: the first); null: all.
        scale: of the queries; null is head_dim^-0.5, Lightning has 1.
        norm: RMSNorm of the output over all heads together, over each head, or none.
        norm_weight: whether the norm has a weight; that of RetNet has none.
        norm_eps: null takes the model's.
        output_gate: activation of the output gate; linear (TransNormerLLM) goes with `norm_weight: false`.
        projection_init: normal, or retnet: Xavier uniform with gain 2^-2.5, and 2^-1 for o_proj.
        discretize: multiply v by the step softplus(u), as Mamba-2 does (with decay=scalar and gate=softplus).
    """

    kind: str = "linear_attention"
    decay: Literal["none", "constant", "scalar", "channel"] = "constant"
    gate: Literal["softplus", "lower_bounded", "logsigmoid"] = "softplus"
    gate_normalizer: float = 16.0
    slopes: Literal["lightning", "alibi", "retnet", "stored"] = "lightning"
    feature_map: Literal["none", "silu", "elu1", "relu"] = "silu"
    value_map: Literal["none", "silu"] = "silu"
    qk_norm: Literal["none", "head"] = "none"
    rotation: Literal["none", "rope", "retnet", "learned"] = "none"
    rope: RopeConfig = field(default_factory=RopeConfig)
    rotated_layers: list[int] | None = None
    scale: float | None = 1.0
    norm: Literal["all", "head", "none"] = "all"
    norm_weight: bool = True
    norm_eps: float | None = 1e-6
    output_gate: Literal["none", "silu", "sigmoid", "linear"] = "sigmoid"
    discretize: bool = False
    projection_init: Literal["normal", "retnet"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gate_normalizer > 0, "gate_normalizer", "must be positive", got=self.gate_normalizer)
        require(not self.discretize or (self.decay == "scalar" and self.gate == "softplus"), "discretize",
                "needs decay=scalar and gate=softplus", got=(self.decay, self.gate))
        require(self.rotation != "retnet" or (self.head_dim % 2 == 0 and self.head_dim > 2), "rotation",
                "turns pairs of dims", got=f"head_dim={self.head_dim}", expected="an even head_dim of 4 or more")
        if self.rotation == "rope":
            require(self.rope.kind != "none", "rope.kind", "rotates nothing", got="none",
                    expected="half or interleaved, or rotation=none")
            self.rope.check(self.head_dim)
        require(self.rotation != "learned" or self.decay != "channel", "rotation", "cannot stand beside channel decay",
                got=self.rotation, expected="none, rope or retnet with decay=channel")
        require(self.rotated_layers is None or self.rotation == "learned", "rotated_layers", "needs rotation=learned",
                got=self.rotated_layers, expected=f"null with rotation={self.rotation}")

    def has_weighted_norm(self) -> bool:
        return self.norm != "none" and self.norm_weight

    def num_params(self, context: LayerContext) -> int:
        norm = {"all": self.value_heads * self.value_dim, "head": self.value_dim, "none": 0}[self.norm]
        angles = self.num_heads * self.head_dim * self.learns_angles(context.layer_index)
        heads = 2 * self.head_dim * (self.qk_norm == "head")
        return super().num_params(context) + norm * self.norm_weight + angles + heads

    def learns_angles(self, layer_index: int) -> bool:
        """Whether the layer has the learned rotation, and so keys of twice the dims."""
        return self.rotation == "learned" and (self.rotated_layers is None or layer_index in self.rotated_layers)

    def _more_state(self, context: LayerContext) -> int:
        """Elements that the learned rotation adds to the state."""
        return self.value_heads * self.head_dim * self.value_dim * self.learns_angles(context.layer_index)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        parts = super().flops_per_token(context, context_length)
        parts["recurrence"] += float(self._more_state(context) * self._flops_per_state_entry())
        return parts

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        return super().state_bytes(context, context_length, element_bytes) + FP32_BYTES * self._more_state(context)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        keys = 6 * self.num_heads * self.head_dim * self.learns_angles(context.layer_index)
        more = keys + self._more_state(context) / CHUNK_TOKENS
        return super().activation_bytes(context, element_bytes) + FP32_BYTES * more

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        found = super().shard_traffic(context, rows, length, shards, element_bytes)
        more = rows * FP32_BYTES * self._more_state(context)
        return [*found[:-1], ShardTraffic("gather", found[-1].forward + more, found[-1].backward + more)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        if self.gate != "logsigmoid" or not self.gate_width:
            data.pop("gate_normalizer")
        if self.decay != "constant":
            data.pop("slopes")
        data.pop("projection_init")
        if self.rotation != "learned":
            data.pop("rotated_layers")
        data["rope"] = self.rope.canonical(uses_mscale=False) if self.rotation == "rope" else None
        return data

    def transfer_gaps(self) -> list[str]:
        return ["the norm of linear attention over all heads, which smooths over more of them"] * (self.norm == "all")

    def rotates(self) -> bool:
        return self.rotation != "none"

    def calibrated_form(self) -> Self:
        """The same mixer with an output gate that has an open state, and slopes that calibration can set."""
        form = super().calibrated_form()
        return replace(form, slopes="stored") if form.decay == "constant" else form


def compute_decay_slopes(kind: Literal["lightning", "alibi", "retnet"], heads: int, layer_index: int,
                         num_layers: int) -> list[float]:
    """Slopes -g per head for `decay: constant`; layers after the last one (multi-token prediction) take its slopes.

    >>> compute_decay_slopes("lightning", heads=2, layer_index=0, num_layers=4)
    [0.062500625, 0.0039062890625]
    """
    if kind == "retnet":
        return [-math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]
    depth = min(layer_index, num_layers - 1) / (num_layers - 1 + 1e-5)
    slopes = _alibi_slopes(heads) if kind == "alibi" else _power_slopes(heads)
    return [slope * (1 - depth + 1e-5) for slope in slopes]


def _power_slopes(heads: int) -> list[float]:
    return [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]


def _alibi_slopes(heads: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022): for H that is no power of two, those of the power below it come first.

    They are followed by every other one of those of twice that power, from the first on.

    >>> _alibi_slopes(3)
    [0.0625, 0.00390625, 0.25]
    """
    power = 2 ** int(math.log2(heads))
    return _power_slopes(power) + _power_slopes(2 * power)[0::2][: heads - power]


@register_mixer("linear_attention", LinearAttentionConfig)
class LinearAttention(RecurrentMixer):
    """The module: parameters of `RecurrentMixer`, o_norm over all heads or over one, if it has a weight, and the buffer
    slopes [HV] where they are stored. With a learned rotation also theta [H, K], radians per token; by option q_norm
    and k_norm [K].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = (*RecurrentMixer.fp32_parameters, "slopes", "theta", "q_norm.weight",
                                                "k_norm.weight")
    config: LinearAttentionConfig
    slopes: Tensor

    def __init__(self, config: LinearAttentionConfig, context: LayerContext):
        super().__init__(config, context)
        dims = config.value_dim * (config.value_heads if config.norm == "all" else 1)
        self.o_norm = None if config.norm == "none" else self.build_output_norm(
            dims, context, config.norm_weight)
        self.q_norm = self.k_norm = None
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = (RMSNorm.of(context.norm, config.head_dim, config.norm_eps) for _ in range(2))
        self.rotary_dim = config.rope.rotary_dim(config.head_dim)
        self.theta = None
        if config.learns_angles(context.layer_index):
            self.theta = nn.Parameter(torch.zeros(config.num_heads, config.head_dim))
        self.scale = config.head_dim**-0.5 if config.scale is None else config.scale
        kind = "lightning" if config.slopes == "stored" else config.slopes
        self._slopes = compute_decay_slopes(kind, config.value_heads, context.layer_index, context.num_layers)
        self.stores_slopes = config.decay == "constant" and config.slopes == "stored"
        if self.stores_slopes:
            self.register_buffer("slopes", torch.zeros(config.value_heads))
        # Not a buffer: a cast of the model would round it, and `to_empty` after a build on meta would lose it.
        self._constant_g: Tensor | None = None

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: RecurrentState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        q_BTC, k_BTC, v_BTC = self.project_inputs(x_BTD, seq, state)
        q_BTHK, k_BTHK = self._mapped(q_BTC, self.q_norm, seq), self._mapped(k_BTC, self.k_norm, seq)
        v_BTHvV = apply_feature_map(config.value_map, v_BTC).unflatten(-1, (config.value_heads, config.value_dim))
        g, gate = None, None
        if config.decay == "constant":
            g = self._constant_decay(x_BTD)
        elif config.decay != "none":
            u = self.project_forget_gate(x_BTD)
            g, gate = self.prepare_decay(u, x_BTD.dtype)
            if config.discretize:
                v_BTHvV = (v_BTHvV * F.softplus(self.build_forget_gate().step(u))[..., None]).to(v_BTHvV.dtype)
        o_BTHvV, matrix = linear_attention(q_BTHK, k_BTHK, v_BTHvV, g=g, gate=gate, scale=self.scale,
                                           cu_seqlens=seq.cu_seqlens,
                                           initial_state=None if state is None else state.matrix,
                                           final_state=state is not None or seq.shard is not None)
        if state is not None:
            state.matrix = matrix
        if seq.shard is not None:
            left = compute_decay_from_start(log_decay(g, gate), matrix.dtype, seq.shard)
            o_BTHvV = o_BTHvV + self._from_earlier_shards(q_BTHK, left, matrix, seq.shard).to(o_BTHvV.dtype)
        return self.project_output(o_BTHvV, x_BTD, self.o_norm, all_heads=config.norm == "all"), {}

    def prepare_step(self) -> DecodeStep:
        config = self.config
        project = prepare_inputs(self)
        project_gate = prepare_forget_gate(self) if config.decay in ("scalar", "channel") else None
        finish = prepare_output(self, self.o_norm, all_heads=config.norm == "all")
        values = (-1, config.value_heads, config.value_dim)
        key_dim = config.head_dim * (1 if self.theta is None else 2)

        def step(x_B1D: Tensor, seq: SequenceInfo, state: RecurrentState) -> Tensor:
            x_BD = x_B1D[:, 0]
            q_BC, k_BC, v_BC = project(x_BD, state)
            q_BHK = self._mapped(q_BC[:, None], self.q_norm, seq)[:, 0]
            k_BHK = self._mapped(k_BC[:, None], self.k_norm, seq)[:, 0]
            v_BHvV = apply_feature_map(config.value_map, v_BC).view(values)
            g = self._constant_decay(x_BD) if config.decay == "constant" else None
            if project_gate is not None:
                u = project_gate(x_BD)
                g = decode_log_decay(self, u)
                if config.discretize:
                    v_BHvV = (v_BHvV * F.softplus(self.build_forget_gate().step(u))[..., None]).to(v_BHvV.dtype)
            o_BHvV = linear_attention_step(q_BHK, k_BHK, v_BHvV, g, self.scale, state_matrix(state, v_BHvV, key_dim))
            return finish(o_BHvV, x_BD).unsqueeze(1)

        return step

    def _mapped(self, x_BTC: Tensor, norm: RMSNorm | None, seq: SequenceInfo) -> Tensor:
        """Queries or keys [B, T, H, K] under norm, feature map and rotation of the layer."""
        config = self.config
        if norm is not None:
            x_BTC = norm(x_BTC.unflatten(-1, (config.num_heads, config.head_dim))).flatten(-2)
        x_BTHK = apply_feature_map(config.feature_map, x_BTC).unflatten(-1, (config.num_heads, config.head_dim))
        if config.rotation == "rope":
            return rotate(x_BTHK, config.rope, self.rotary_dim, seq)
        if config.rotation == "retnet":
            return retnet_rotate(x_BTHK, seq)
        return x_BTHK if self.theta is None else with_learned_angles(x_BTHK, self.theta, seq)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return self.find_roles({} if self.theta is None else {"theta": VECTOR})

    def _from_earlier_shards(self, q_BTHK: Tensor, left_BTHvX: Tensor, state_NHvKV: Tensor, shard: RowShard) -> Tensor:
        """The part [B, T, HV, V] of the outputs that comes from tokens of earlier shards.

        The recurrence is linear in its state S and only decays it: S_t = left_t S + (the state from zero), and
        o_t = scale * (left_t q_t)^T S + (the output from zero).
        """
        incoming_BHvKV = shard.incoming(shard.at_end(state_NHvKV), left_BTHvX[:, -1, :, :, None], torch.mul)
        value_heads_per_head = self.config.value_heads // self.config.num_heads
        q_BTHvK = q_BTHK.to(incoming_BHvKV.dtype).repeat_interleave(value_heads_per_head, 2)
        return read_incoming_state(q_BTHvK * left_BTHvX, incoming_BHvKV) * self.scale

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.theta is not None:
            self.theta.copy_(published_angles(*self.theta.shape))
        if self.config.projection_init == "retnet":
            for name in ("q_proj", "k_proj", "v_proj", "g_proj"):
                if hasattr(self, name):
                    nn.init.xavier_uniform_(getattr(self, name).weight, gain=2**-2.5)
            nn.init.xavier_uniform_(self.o_proj.weight, gain=2**-1)
        if self.stores_slopes:
            self.slopes.copy_(torch.tensor(self._slopes))

    @torch.no_grad()
    def calibrate(self, half_life_H: Tensor) -> None:
        """Set what every linear mixer sets, and slopes that are stored."""
        super().calibrate(half_life_H)
        if self.stores_slopes:
            self.slopes.copy_(math.log(2) / spread_over_heads(half_life_H.double(), self.config.value_heads))

    def build_forget_gate(self) -> Gate:
        return replace(super().build_forget_gate(), normalizer=self.config.gate_normalizer)

    def _constant_decay(self, x_BTD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        if self.stores_slopes:
            return -self.slopes.to(dtype)
        if torch.compiler.is_compiling():  # what is kept would be a reason to compile again
            return torch.tensor([-s for s in self._slopes], dtype=dtype, device=x_BTD.device)
        if self._constant_g is None or self._constant_g.device != x_BTD.device or self._constant_g.dtype != dtype:
            with torch.inference_mode(False):  # it may serve training after generation
                self._constant_g = torch.tensor([-s for s in self._slopes], dtype=dtype, device=x_BTD.device)
        return self._constant_g


def apply_feature_map(kind: str, x: Tensor) -> Tensor:
    """x under the feature map of this kind, element by element."""
    if kind == "silu":
        return F.silu(x)
    if kind == "elu1":
        return F.elu(x) + 1
    return F.relu(x) if kind == "relu" else x
