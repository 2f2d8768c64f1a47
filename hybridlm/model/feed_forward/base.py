"""The contract of a feed-forward and the registry of their kinds."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from hybridlm.model.config import FeedForwardConfig, LayerContext
from hybridlm.model.mixers.base import Aux
from hybridlm.model.sequence import SequenceInfo


class FeedForward(nn.Module):
    """Works on each token alone: x_BTD -> x_BTD."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ()

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Aux]:
        raise TypeError(f"{type(self).__name__} has no forward")

    def init_weights(self, std: float) -> None:
        raise TypeError(f"{type(self).__name__} has no initialisation")


FEED_FORWARDS: dict[str, tuple[type[FeedForwardConfig], type[FeedForward]]] = {}


def register_feed_forward(kind: str, config: type[FeedForwardConfig]):
    """Class decorator: `kind` in a config builds this feed-forward."""

    def add(cls: type[FeedForward]) -> type[FeedForward]:
        FEED_FORWARDS[kind] = (config, cls)
        return cls

    return add


def build_feed_forward(config: FeedForwardConfig, context: LayerContext) -> FeedForward:
    return FEED_FORWARDS[config.kind][1](config, context)  # type: ignore[call-arg]
