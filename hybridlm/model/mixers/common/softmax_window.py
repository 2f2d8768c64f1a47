"""Softmax attention to a window, to which a linear part is added: options, projections and what training tools ask.

B rows, T tokens, D hidden size, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor, nn

from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers.common.attention_weights import take_grouped_projections
from hybridlm.model.mixers.common.dense_attention import dense_attention
from hybridlm.model.mixers.common.grouped_heads import GroupedHeadsConfig
from hybridlm.model.mixers.contract import MixerConfig, SequenceMixer
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class SoftmaxWindowConfig(GroupedHeadsConfig):
    """Base of configs of a softmax window with a linear part, which can start from softmax attention.

    Args:
        rope: rotary embedding of queries and keys in the window.
        window: keys of the window, the token's own included.
        qkv_bias: biases of q_proj, k_proj and v_proj.
    """

    rope: RopeConfig = field(default_factory=RopeConfig)
    window: int = 64
    qkv_bias: bool = False
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rope.check(self.head_dim)
        self.check_window(self.window)

    def _projection_params(self, context: LayerContext) -> int:
        H, G, K = self.num_heads, self.kv_heads, self.head_dim
        return 2 * context.hidden_size * (H + G) * K + (H + 2 * G) * K * self.qkv_bias

    def rotates(self) -> bool:
        return self.rope.kind != "none"

    def adapted_to(self, old: MixerConfig) -> Self:
        """The same mixer with the rotation and biases of `old`."""
        return replace(self, rope=copy.deepcopy(getattr(old, "rope", self.rope)),
                       qkv_bias=getattr(old, "qkv_bias", False))

    def initial_weights_from(self, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig) -> dict[str, Tensor]:
        """Take the projections of softmax attention of as many heads and dims."""
        return take_grouped_projections(self, old, tensors, norm, biases=self.qkv_bias)


class SoftmaxWindowMixer(SequenceMixer):
    """Base of mixers with a softmax window and a linear part; parameters: q_proj, k_proj, v_proj, o_proj."""

    config: SoftmaxWindowConfig

    def __init__(self, config: SoftmaxWindowConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, G, K = context.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        self.rotary_dim = config.rope.rotary_dim(K)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, K], keys and values [B, T, G, K], not rotated."""
        q_BTHK, k_BTGK, v_BTGK = (proj(x_BTD).unflatten(-1, (-1, self.config.head_dim))
                                  for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q_BTHK, k_BTGK, v_BTGK

    def rotated(self, x_BTHK: Tensor, seq: SequenceInfo) -> Tensor:
        """Queries or keys, rotated by the positions of their tokens."""
        return rotate(x_BTHK, self.config.rope, self.rotary_dim, seq)

    def output_projection(self) -> tuple[nn.Linear, int]:
        return self.o_proj, self.config.num_heads

    def without_linear_branch(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        """The output of softmax attention to the window alone, in full."""
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD)
        o_BTHK = dense_attention(self.rotated(q_BTHK, seq), self.rotated(k_BTGK, seq), v_BTGK, seq,
                                 window=self.config.window)
        return self.o_proj(o_BTHK.flatten(-2))

    def head_rows(self) -> dict[str, int]:
        return {"q_proj": self.config.num_heads, "k_proj": self.config.kv_heads, "v_proj": self.config.kv_heads}
