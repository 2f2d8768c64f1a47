"""Squared ReLU without a gate.

    y = W_down relu(W_up x)^2

Sources: So et al. 2021 (Primer), section 4; NVIDIA 2025 (Nemotron-H), section 2.1.
B rows, T tokens, D hidden size, I inner width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.feed_forward.contract import FeedForward, FeedForwardConfig, register_feed_forward
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class SquaredReLUConfig(FeedForwardConfig):
    """Configuration of one squared ReLU per layer.

    Args:
        intermediate_size: the inner width I.
    """

    kind: str = "squared_relu"
    intermediate_size: int

    def __post_init__(self) -> None:
        require(self.intermediate_size > 0, "intermediate_size", "must be positive", got=self.intermediate_size)

    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        return 2 * context.hidden_size * self.intermediate_size

    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        return {"squared_relu": 2.0 * self.num_params(context)}

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the input, and three inner tensors around the square."""
        return element_bytes * (context.hidden_size + 3.0 * self.intermediate_size)


@register_feed_forward("squared_relu", SquaredReLUConfig)
class SquaredReLU(FeedForward):
    """The module of one squared ReLU: parameters up_proj [I, D], down_proj [D, I]."""

    def __init__(self, config: SquaredReLUConfig, context: LayerContext):
        super().__init__()
        self.up_proj = nn.Linear(context.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, context.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: None = None) -> tuple[Tensor, Aux]:
        return self.down_proj(F.relu(self.up_proj(x_BTD)).square()), {}

    def init_weights(self, std: float) -> None:
        for linear in (self.up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=std)
