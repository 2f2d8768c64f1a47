"""Facts about the model that a branch of a layer is told, and plain types that every kind's costs are stated in.

This file stands below all mixers and feed-forwards; it needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridlm.errors import require


@dataclass(kw_only=True)
class NormConfig:
    """RMSNorm. `zero_centered` is the Gemma form: x_hat * (1 + weight), weight initialised at 0."""

    eps: float = 1e-6
    zero_centered: bool = False

    def __post_init__(self) -> None:
        require(self.eps > 0, "eps", "must be positive", got=self.eps)


@dataclass(kw_only=True)
class LayerContext:
    """The model around one layer, as its mixer and feed-forward may know it. Not user configuration."""

    hidden_size: int
    layer_index: int
    num_layers: int
    norm: NormConfig
    max_position: int


@dataclass(frozen=True)
class ShardTraffic:
    """Bytes that one process hands to one kind of exchange between shards of rows (`hybridlm.model.context_parallel`).

    For `exchange` these are the bytes of all shards together; for the backward of `gather` they are the bytes of the
    process's own shard.
    """

    kind: Literal["gather", "exchange", "from_previous"]
    forward: int
    backward: int
