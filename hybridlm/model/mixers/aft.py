"""AFT-full and AFT-local: an attention-free mixer whose weights depend on keys and on pairs of positions.

    y_t = sum_{s<=t} e^{k_s + w_ts} v_s / sum_{s<=t} e^{k_s + w_ts},   w_ts = left_t . right_s,   channel by channel
    out = W_o (sigmoid(q) * y);   local: w_ts = 0 where t - s >= weight_window

Source: Zhai et al. 2021, An attention free transformer, sections 3.1 and 3.2, in the causal form.

B rows, T tokens, S keys, D hidden size and channels, P positions, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import ConfigError, require
from hybridlm.model.decode_state import AttentionState
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.cost import count_visible_keys
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.contract import Aux, MixerConfig, SequenceMixer, register_mixer
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import position_weighted_mean

FP32_BYTES = 4  # bytes per element
FACTOR_STD = 0.1  # of both factors of w at the start


@dataclass(kw_only=True)
class AFTConfig(MixerConfig):
    """Configuration of AFT-full and AFT-local.

    Args:
        rank: rank R of the matrix w of weights for pairs of positions.
        weight_window: tokens, the query's own included, for which w is learned; null: all (AFT-full).
        max_length: positions P, which is the longest document; null is the model's max_position.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "aft"
    rank: int = 128
    weight_window: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        for key in ("rank", "weight_window", "max_length"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)

    def positions(self, context: LayerContext) -> int:
        """Positions P that have weights."""
        return context.max_position if self.max_length is None else self.max_length

    def num_params(self, context: LayerContext) -> int:
        return 4 * context.hidden_size**2 + 2 * self.positions(context) * self.rank

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Both sums are products of weights with values and with ones; w is counted once per row."""
        pairs = count_visible_keys(context_length)
        return {"projections": 8.0 * context.hidden_size**2,
                "attention": pairs * (4.0 * context.hidden_size + 2.0 * self.rank)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        return 2 * context_length * context.hidden_size * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: input and projections; all weights are computed again."""
        return context.hidden_size * (6.0 * element_bytes + 4.0 * FP32_BYTES)

    def check_context_parallel(self, shards: int, length: int) -> None:
        raise ConfigError("kind", "cannot work on split rows: its weights are of pairs of positions of whole rows",
                          got=self.kind, expected="engine.context_parallel=1")


@register_mixer("aft", AFTConfig)
class AFT(SequenceMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj [D, D], left and right [P, R]."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("left", "right")
    config: AFTConfig

    def __init__(self, config: AFTConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D = context.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.left, self.right = (nn.Parameter(torch.zeros(config.positions(context), config.rank)) for _ in range(2))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: AttentionState | None = None) -> tuple[Tensor, Aux]:
        k_BSD, v_BSD = self.k_proj(x_BTD), self.v_proj(x_BTD)
        if state is not None:
            k_BSD, v_BSD = state.keys.append(k_BSD), state.values.append(v_BSD)
        if seq.cu_seqlens is None and k_BSD.shape[1] > self.left.shape[0]:
            raise ConfigError("max_length", "has weights for fewer positions", got=self.left.shape[0],
                              expected=f"{k_BSD.shape[1]} or more")
        y_BTD = position_weighted_mean(k_BSD, v_BSD, self.left, self.right, window=self.config.weight_window,
                                       queries=x_BTD.shape[1], cu_seqlens=seq.cu_seqlens)
        return self.o_proj(self.q_proj(x_BTD).sigmoid() * y_BTD.to(x_BTD.dtype)), {}

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, dict.fromkeys(("left", "right"), ParameterRole("embedding")))

    def new_state(self, batch: int, max_length: int) -> AttentionState:
        return AttentionState.empty(max_length)

    def init_weights(self, std: float) -> None:
        """Projections are normal(0, std), both factors of w normal(0, 0.1)."""
        init_projections(self, std)
        for factor in (self.left, self.right):
            nn.init.normal_(factor, std=FACTOR_STD)
