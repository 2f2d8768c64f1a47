"""No feed-forward: layers are their mixers alone, as in Mamba.

Source: Gu and Dao 2023 (Mamba), section 3.4: one block in place of a mixer and a feed-forward.
B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridlm.model.feed_forward.contract import FeedForward, FeedForwardConfig, register_feed_forward
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class NoFeedForwardConfig(FeedForwardConfig):
    """Configuration of no feed-forward, which has no options."""

    kind: str = "none"
    is_branch: ClassVar[bool] = False

    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        return 0

    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        return {}


@register_feed_forward("none", NoFeedForwardConfig)
class NoFeedForward(FeedForward):
    """A module without parameters, which the layer does not call."""

    def __init__(self, config: NoFeedForwardConfig, context: LayerContext):
        super().__init__()

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: None = None) -> tuple[Tensor, Aux]:
        """Zeros, which would change no residual stream."""
        return torch.zeros_like(x_BTD), {}

    def init_weights(self, std: float) -> None:
        """There is nothing to initialise."""
