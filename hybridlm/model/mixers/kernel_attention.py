"""Kernelised attention: softmax's exp(q . k) replaced by phi(q) . phi(k), with the denominator.

    S_t = f_t S_{t-1} + phi(k_t) v_t^T;   z_t = f_t z_{t-1} + phi(k_t)
    y_t = W_o (S_t^T phi(q_t) / (phi(q_t) . z_t))

f = 1, or with a gate f = sigmoid(w . x + b), and what is written is then times 1 - f. The denominator is one more
value, 1, of every token. `feature_map` says which system it is: Linear Transformer, Performer, RFA, cosFormer,
Hedgehog, Based, ReBased, T2R, DPFP.
Sources: those of `hybridlm.model.mixers.common.feature_maps`; Katharopoulos et al. 2020, section 3.2.

B rows, T tokens, D hidden size, H heads, K dims of queries and keys, F features, V dims of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.attention_weights import take_attention_projections
from hybridlm.model.mixers.common.feature_maps import FEATURE_MAPS, check_count
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.matrix_state import compute_decay_from_start, read_incoming_state
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import linear_attention

FP32_BYTES = 4  # bytes per element
CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations


@dataclass(kw_only=True)
class KernelAttentionConfig(StateHeadsConfig):
    """Configuration of kernelised attention.

    Args:
        num_heads: heads H.
        head_dim: dims K of queries and keys, before the feature map.
        value_head_dim: dims V of values; null is `head_dim`.
        feature_map: phi; see `hybridlm.model.mixers.common.feature_maps`.
        features: size of the map: directions of performer, rfa and t2r, products of dpfp; null is the map's own choice.
        max_length: length M of cosformer; null is the model's max_position.
        gate: none, or scalar: a forget gate per head, as in RFA-Gate.
        normalizer: the denominator d: add divides by d + eps, floor by max(d, eps), none divides by nothing.
        normalizer_eps: eps.

    Raises:
        ConfigError: a size that is not positive, or that the map does not have.
    """

    kind: str = "kernel_attention"
    num_heads: int
    head_dim: int
    value_head_dim: int | None = None
    feature_map: Literal["elu1", "relu", "softmax", "dpfp", "cosformer", "taylor", "rebased", "hedgehog", "t2r",
                         "performer", "rfa"] = "elu1"
    features: int | None = None
    max_length: int | None = None
    gate: Literal["none", "scalar"] = "none"
    normalizer: Literal["add", "floor", "none"] = "add"
    normalizer_eps: float = 1e-6

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "value_head_dim", "max_length", "normalizer_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        check_count(self.feature_map, self.head_dim, self.features)
        require(self.max_length is None or self.feature_map == "cosformer", "max_length", "needs feature_map=cosformer",
                got=self.max_length, expected="null")

    @property
    def value_dim(self) -> int:
        """Dims V of values."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def map_count(self) -> int:
        """The size of the feature map, its own choice written out."""
        return FEATURE_MAPS[self.feature_map].default_count(self.head_dim) if self.features is None else self.features

    @property
    def num_features(self) -> int:
        """Features F per head."""
        return FEATURE_MAPS[self.feature_map].num_features(self.head_dim, self.map_count)

    @property
    def state_size(self) -> int:
        """Numbers in the state of all heads: S and z."""
        return self.num_heads * self.num_features * (self.value_dim + (self.normalizer != "none"))

    def _projection_params(self, context: LayerContext) -> int:
        gate = self.num_heads if self.gate == "scalar" else 0
        return context.hidden_size * (2 * self.num_heads * (self.head_dim + self.value_dim) + gate)

    def num_params(self, context: LayerContext) -> int:
        of_map = FEATURE_MAPS[self.feature_map].num_params(self.num_heads, self.head_dim, self.map_count)
        return self._projection_params(context) + of_map + (self.num_heads if self.gate == "scalar" else 0)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it; the elements of feature maps are not counted."""
        of_map = FEATURE_MAPS[self.feature_map].flops(self.num_heads, self.head_dim, self.map_count)
        return {"projections": 2.0 * self._projection_params(context), "feature map": of_map,
                "recurrence": self.state_size * (4.0 + (self.gate == "scalar"))}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        return FP32_BYTES * self.state_size

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: projections, features in two forms, and the chunked operation."""
        H, K, V, features = self.num_heads, self.head_dim, self.value_dim, self.num_features
        chunk = H * (features * (V + 1) / CHUNK_TOKENS + CHUNK_TOKENS)
        widths = H * (6 * K + 6 * features + 5 * V + 4)
        return element_bytes * (context.hidden_size + H * V) + FP32_BYTES * (widths + chunk)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: numerator and denominator are linear in the state."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """Bytes in fp32 of the state, and of the decay over a shard."""
        state = rows * FP32_BYTES * self.state_size
        decay = FP32_BYTES * (rows * self.num_heads if self.gate == "scalar" else rows)
        return [ShardTraffic("gather", state + decay, state + decay)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm) | {"value_head_dim": self.value_dim}
        if FEATURE_MAPS[self.feature_map].has_count:
            data["features"] = self.map_count
        if self.normalizer == "none":
            data.pop("normalizer_eps")
        return data

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Heads of the nearest mixer; its dims are those of the values too, where a preset sets those of the keys."""
        heads = model.heads_for(cls)
        return {"num_heads": heads.num_heads, "head_dim": heads.head_dim, "value_head_dim": heads.head_dim}

    def initial_weights_from(self, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig) -> dict[str, Tensor]:
        """Take the projections of softmax attention, where heads and dims fit."""
        keys, values = (self.num_heads, self.head_dim), (self.num_heads, self.value_dim)
        return take_attention_projections(old, tensors, {"q_proj": keys, "k_proj": keys, "v_proj": values}, norm)


@register_mixer("kernel_attention", KernelAttentionConfig)
class KernelAttention(TensorStateMixer):
    """Parameters: q_proj, k_proj [H K, D], v_proj [H V, D], o_proj [D, H V], those of the feature map, and with a gate
    gate_proj [H, D] with gate_bias [H].
    """

    config: KernelAttentionConfig

    def __init__(self, config: KernelAttentionConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H = context.hidden_size, config.num_heads
        self.q_proj, self.k_proj = (nn.Linear(D, H * config.head_dim, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(D, H * config.value_dim, bias=False)
        self.o_proj = nn.Linear(H * config.value_dim, D, bias=False)
        count = config.features
        if config.feature_map == "cosformer":
            count = context.max_position if config.max_length is None else config.max_length
        self.feature_map = FEATURE_MAPS[config.feature_map](H, config.head_dim, count)
        if config.gate == "scalar":
            self.gate_proj = nn.Linear(D, H, bias=False)
            self.gate_bias = nn.Parameter(torch.zeros(H))
        self.fp32_parameters = (*(f"feature_map.{name}" for name in self.feature_map.fp32_tensors_of_map), "gate_bias")  # type: ignore[misc]

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        q_BTHF = self._features(self.q_proj(x_BTD), "q", seq)
        k_BTHF = self._features(self.k_proj(x_BTD), "k", seq)
        v_BTHV = self.v_proj(x_BTD).unflatten(-1, (config.num_heads, config.value_dim))
        g_BTH = None
        if config.gate == "scalar":
            u_BTH = self.gate_proj(x_BTD).to(torch.promote_types(x_BTD.dtype, torch.float32)) + self.gate_bias
            g_BTH = F.logsigmoid(u_BTH)
            k_BTHF = k_BTHF * (-u_BTH).sigmoid()[..., None]
        if config.normalizer != "none":
            v_BTHV = F.pad(v_BTHV, (0, 1), value=1.0)  # the denominator: a value that is 1 for every token
        o_BTHV = self._attend(q_BTHF.to(x_BTD.dtype), k_BTHF.to(x_BTD.dtype), v_BTHV, g_BTH, seq, state)
        if config.normalizer != "none":
            o_BTHV, total_BTH1 = o_BTHV.split([config.value_dim, 1], -1)
            if config.normalizer == "add":
                total_BTH1 = total_BTH1 + config.normalizer_eps
            else:
                total_BTH1 = total_BTH1.clamp(min=config.normalizer_eps)
            o_BTHV = o_BTHV / total_BTH1
        return self.o_proj(o_BTHV.to(x_BTD.dtype).flatten(-2)), {}

    def _features(self, x_BTC: Tensor, side: Literal["q", "k"], seq: SequenceInfo) -> Tensor:
        """The features [B, T, H, F] of projected queries or keys, in fp32 at least."""
        x_BTHK = x_BTC.to(torch.promote_types(x_BTC.dtype, torch.float32)).unflatten(-1, (self.config.num_heads, -1))
        with torch.autocast(x_BTC.device.type, enabled=False):
            return self.feature_map(x_BTHK, side, seq.positions_BT)

    def _attend(self, q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, g_BTH: Tensor | None, seq: SequenceInfo,
                state: TensorState | None) -> Tensor:
        """Numerator and, in the last column, denominator: [B, T, H, V + 1]."""
        start = None if state is None else state.tensors.get("matrix")
        o_BTHV, matrix_NHFV = linear_attention(q_BTHF, k_BTHF, v_BTHV, g=g_BTH, scale=1.0, cu_seqlens=seq.cu_seqlens,
                                               initial_state=start,
                                               final_state=state is not None or seq.shard is not None)
        if state is not None:
            state.tensors["matrix"] = matrix_NHFV
        if seq.shard is None:
            return o_BTHV
        left_BTHX = compute_decay_from_start(g_BTH, matrix_NHFV.dtype, seq.shard)
        incoming_BHFV = seq.shard.incoming(seq.shard.at_end(matrix_NHFV), left_BTHX[:, -1, :, :, None], torch.mul)
        earlier_BTHV = read_incoming_state(q_BTHF.to(incoming_BHFV.dtype) * left_BTHX, incoming_BHFV)
        return o_BTHV + earlier_BTHV.to(o_BTHV.dtype)

    def output_projection(self) -> tuple[nn.Linear, int]:
        return self.o_proj, self.config.num_heads

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj"), self.config.num_heads)

    @property
    def decodes_padded_rows(self) -> bool:
        return True  # the state is a function of the row alone, and positions are counted from its start

    def init_weights(self, std: float) -> None:
        """Projections are normal(0, std), the bias of the gate 0, and the feature map as published."""
        init_projections(self, std)
        self.feature_map.reset_parameters()
        if self.config.gate == "scalar":
            nn.init.zeros_(self.gate_bias)
