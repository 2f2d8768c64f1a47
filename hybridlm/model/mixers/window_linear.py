"""Softmax over a window and linear attention over everything before it, with one denominator (LoLCATs).

    n_t = sum over the window of exp(q_t . k_s / sqrt(K) - m_t),     m_t the largest of these scores
    o_t = (a sum over the window of exp(..) v_s + b sum over older s of phi(q_t) . phi(k_s) v_s) / (the same without v)
    phi(x) = [softmax(W x), softmax(-W x)],     a = sigmoid(window_factor) per head,     b = 1 or 1 - a

m_t is part of the definition, because the linear part is not scaled by it.

Sources: Zhang et al. 2024, LoLCATs, section 3.1 and its published code; phi: Zhang et al. 2024, Hedgehog.
B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, K head dim, F rows of W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.dense_attention import attention_exchange_size, heads_of_all_tokens
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.softmax_window import SoftmaxWindowConfig, SoftmaxWindowMixer
from hybridlm.model.mixers.common.window_state import WindowState
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import attention_total, linear_attention
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide

FP32_BYTES = 4  # bytes per element
MIN_FEATURE = 1e-12  # of the published code


@dataclass(kw_only=True)
class WindowLinearConfig(SoftmaxWindowConfig):
    """Configuration of a softmax window with a linear tail.

    Args:
        num_heads: query heads H.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G; null is `num_heads`.
        rope: rotary embedding of queries and keys, in both parts.
        window: keys of the softmax part, the token's own included; all older ones are in the linear part.
        feature_dim: rows F of each W; null is half of `head_dim`, as published. The features are twice as many.
        convex: whether b is 1 - a; else it is 1.
        window_factor_init: start of window_factor, before the sigmoid.
        qkv_bias: biases of q_proj, k_proj and v_proj.
    """

    kind: str = "window_linear"
    feature_dim: int | None = None
    convex: bool = False
    window_factor_init: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.map_dim > 0, "feature_dim", "must be positive", got=self.map_dim)

    @property
    def map_dim(self) -> int:
        """Rows F of each W."""
        return self.head_dim // 2 if self.feature_dim is None else self.feature_dim

    def num_params(self, context: LayerContext) -> int:
        return self._projection_params(context) + self.num_heads * (2 * self.head_dim * self.map_dim + 1)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        D, H, G, K = context.hidden_size, self.num_heads, self.kv_heads, self.head_dim
        return {"projections": 4.0 * D * (H + G) * K, "feature map": 4.0 * H * K * self.map_dim,
                "attention": 4.0 * H * K * self.window, "recurrence": 8.0 * H * self.map_dim * (K + 1)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the window's keys and values, and of the state matrix with its denominator in fp32."""
        matrix = FP32_BYTES * self.num_heads * 2 * self.map_dim * (self.head_dim + 1)
        return min(context_length, self.window) * 2 * self.kv_heads * self.head_dim * element_bytes + matrix

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        features = 2 * self.num_heads * (4 * self.map_dim + 2 * self.head_dim)
        return element_bytes * (2 * queries + 3 * keys) + FP32_BYTES * (features + 4 * queries)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        size = attention_exchange_size(self.num_heads, self.kv_heads, self.head_dim, shards)
        return [ShardTraffic("exchange", rows * length * element_bytes * size, rows * length * element_bytes * size)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm) | {"feature_dim": self.map_dim}
        del data["window_factor_init"]  # it says how weights start
        return data


@register_mixer("window_linear", WindowLinearConfig)
class WindowLinear(SoftmaxWindowMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj, q_map and k_map [H, K, F], window_factor [H]."""

    config: WindowLinearConfig
    fp32_parameters: ClassVar[tuple[str, ...]] = ("window_factor",)

    def __init__(self, config: WindowLinearConfig, context: LayerContext):
        super().__init__(config, context)
        self.config = config
        H, K = config.num_heads, config.head_dim
        self.q_map, self.k_map = (nn.Parameter(torch.zeros(H, K, config.map_dim)) for _ in range(2))
        self.window_factor = nn.Parameter(torch.zeros(H))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: WindowState | None = None) -> tuple[Tensor, Aux]:
        q_BTHK, k_BSGK, v_BSGK = self.project(x_BTD)
        q_BTHK, k_BSGK = self.rotated(q_BTHK, seq), self.rotated(k_BSGK, seq)
        maps = self.q_map, self.k_map, self.window_factor
        if seq.shard is not None:
            shard = seq.shard
            q, k, v = heads_of_all_tokens(shard, [q_BTHK], [k_BSGK, v_BSGK])
            o = self._mix(q, k, v, [shard.local_heads(x) for x in maps], shard.borders)
            o_BTHK = shard.by_tokens(o.to(v.dtype))
        else:
            if state is not None:
                k_BSGK, v_BSGK = state.keys.append(k_BSGK), state.values.append(v_BSGK)
            o_BTHK = self._mix(q_BTHK, k_BSGK, v_BSGK, maps, seq.cu_seqlens, state)
        return self.o_proj(o_BTHK.to(x_BTD.dtype).flatten(-2)), {}

    def _mix(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, maps: list[Tensor] | tuple[Tensor, ...],
             borders: CuSeqlens | None, state: WindowState | None = None) -> Tensor:
        """Outputs [B, T, H, K] of both parts in fp32 at least, for the heads that `maps` are of."""
        q_map, k_map, window_factor = maps
        T, window = q_BTHK.shape[1], self.config.window
        o_BTHK, total_BTH = attention_total(q_BTHK, k_BSGK, v_BSGK, window=window, cu_seqlens=borders)
        # The token that leaves the window at each position: none at the first `window` tokens of a document.
        leaving = max(k_BSGK.shape[1] - window, 0)
        copies = q_BTHK.shape[2] // k_BSGK.shape[2]
        k_BnHK, v_BnHK = (wide(x[:, :leaving]).repeat_interleave(copies, 2) for x in (k_BSGK, v_BSGK))
        late = (0, 0, 0, 0, T - leaving, 0)
        features_BTHF = F.pad(hedgehog_features(k_BnHK, k_map), late)
        if borders is not None:
            older_BT = borders.positions().view(-1, T) >= window
            features_BTHF = torch.where(older_BT[..., None, None], features_BTHF, 0.0)
        values_BTHV = F.pad(F.pad(v_BnHK, (0, 1), value=1.0), late)  # a column of ones sums the weights
        start = None if state is None else state.rest.tensors.get("matrix")
        tail_BTHV, matrix = linear_attention(hedgehog_features(q_BTHK, q_map), features_BTHF, values_BTHV, scale=1.0,
                                             initial_state=start, cu_seqlens=borders, final_state=state is not None)
        if state is not None:
            state.rest.tensors["matrix"] = matrix
        near_H = window_factor.sigmoid()
        near_BTH1 = (near_H * total_BTH)[..., None]
        far_H1 = (1.0 - near_H)[:, None] if self.config.convex else 1.0
        tail_BTHV = far_H1 * tail_BTHV
        return (near_BTH1 * o_BTHK + tail_BTHV[..., :-1]) / (near_BTH1 + tail_BTHV[..., -1:])

    def parameter_roles(self) -> dict[str, ParameterRole]:
        maps = {name: ParameterRole("expert_stack") for name in ("q_map", "k_map")}
        return find_roles(self, maps, self.head_rows())

    def new_state(self, batch: int, max_length: int) -> WindowState:
        return WindowState.empty(max_length, self.config.window)

    def init_weights(self, std: float) -> None:
        """Projections are normal(0, std); the maps uniform in +-sqrt(6 / (K F)), as the published code draws them."""
        init_projections(self, std)
        bound = math.sqrt(6.0 / (self.config.head_dim * self.config.map_dim))
        for weight in (self.q_map, self.k_map):
            nn.init.uniform_(weight, -bound, bound)
        nn.init.constant_(self.window_factor, self.config.window_factor_init)


def hedgehog_features(x_BTHK: Tensor, map_HKF: Tensor) -> Tensor:
    """The features [softmax(W x), softmax(-W x)], [B, T, H, 2 F] in fp32 at least.

    >>> hedgehog_features(torch.zeros(1, 1, 1, 3), torch.ones(1, 3, 2)).flatten()
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    with torch.autocast(x_BTHK.device.type, enabled=False):
        y_BTHF = torch.einsum("bthk,hkf->bthf", wide(x_BTHK), map_HKF.to(wide(x_BTHK).dtype))
    return torch.cat([y_BTHF.softmax(-1), (-y_BTHF).softmax(-1)], -1).clamp(min=MIN_FEATURE)
