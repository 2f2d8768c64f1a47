"""Half a softmax window and half gated linear attention, on the same projections (Liger).

    o_t = 1/2 softmax over the window of (q_t . k_s / sqrt(K)) v_s + 1/2 S_t^T phi(q_t)
    S_t = Diag(sigmoid(k_t)^(1 / 16)) S_{t-1} + phi(k_t) v_t^T,     phi = softmax over the dims of a head
    y_t = W_o o_t

The window rotates queries and keys, the linear half does not. There is no parameter beside the four projections, so the
weights of a trained transformer are those of this mixer.

Source: Lan et al. 2025, Liger, sections 3.1 to 3.3 and its published code.
B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.dense_attention import attention_exchange_size, dense_attention
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.matrix_state import FP32_BYTES, matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.softmax_window import SoftmaxWindowConfig, SoftmaxWindowMixer
from hybridlm.model.mixers.common.window_state import WindowState
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class WindowGLAConfig(SoftmaxWindowConfig):
    """Configuration of a softmax window beside gated linear attention.

    Args:
        num_heads: query heads H.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G; null is `num_heads`.
        rope: rotary embedding of queries and keys in the window.
        window: keys of the softmax half, the token's own included.
        gate_normalizer: divisor of the logarithm of the decay.
        qkv_bias: biases of q_proj, k_proj and v_proj.
    """

    kind: str = "window_gla"
    gate_normalizer: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gate_normalizer > 0, "gate_normalizer", "must be positive", got=self.gate_normalizer)

    def num_params(self, context: LayerContext) -> int:
        return self._projection_params(context)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        H, G, K = self.num_heads, self.kv_heads, self.head_dim
        return {"projections": 4.0 * context.hidden_size * (H + G) * K, "attention": 4.0 * H * K * self.window,
                "recurrence": 5.0 * H * K * K}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the window's keys and values, and of the state matrix in fp32."""
        kept = min(context_length, self.window - 1)
        return (kept * 2 * self.kv_heads * self.head_dim * element_bytes
                + FP32_BYTES * self.num_heads * self.head_dim**2)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        return element_bytes * (3 * queries + 4 * keys) + FP32_BYTES * 10 * queries

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        H, K = self.num_heads, self.head_dim
        sent = rows * length * element_bytes * attention_exchange_size(H, self.kv_heads, K, shards)
        return [ShardTraffic("exchange", sent, sent), matrix_traffic(rows, H, K, K, H * K)]


@register_mixer("window_gla", WindowGLAConfig)
class WindowGLA(SoftmaxWindowMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj."""

    config: WindowGLAConfig

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: WindowState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD)
        k_BSGK, v_BSGK = self.rotated(k_BTGK, seq), v_BTGK
        if state is not None:
            k_BSGK, v_BSGK = state.keys.append(k_BSGK), state.values.append(v_BSGK)
        near_BTHK = dense_attention(self.rotated(q_BTHK, seq), k_BSGK, v_BSGK, seq, window=config.window)
        copies = config.num_heads // config.kv_heads
        k_BTHK, v_BTHK = (x.repeat_interleave(copies, 2) for x in (k_BTGK, v_BTGK))
        g_BTHK = F.logsigmoid(wide(k_BTHK)) / config.gate_normalizer
        q_BTHK, k_BTHK = (wide(x).softmax(-1).to(v_BTGK.dtype) for x in (q_BTHK, k_BTHK))
        far_BTHK = scan_matrix_state(q_BTHK, k_BTHK, v_BTHK, g_BTHK, seq, None if state is None else state.rest)
        return self.o_proj((0.5 * near_BTHK + 0.5 * far_BTHK).flatten(-2)), {}

    def new_state(self, batch: int, max_length: int) -> WindowState:
        return WindowState.empty(max_length, self.config.window - 1)

    def init_weights(self, std: float) -> None:
        """Projections are normal(0, std); published models take those of a transformer."""
        init_projections(self, std)
