"""Engine `zero2`: every process holds the weights; gradients and optimizer state are sharded (ZeRO-2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from hybridlm.distributed.engine_config import ENGINES, Collective
from hybridlm.distributed.zero.config import ZeroConfig
from hybridlm.distributed.zero.engine import ZeroEngine


@dataclass(kw_only=True)
class Zero2Config(ZeroConfig):
    """DeepSpeed ZeRO-2: gradients and optimizer state are sharded, so gradients travel after every micro batch."""

    kind: Literal["zero2"] = "zero2"  # type: ignore[mutable-override]
    stage: ClassVar[int] = 2

    def _gradient_bytes(self, weights: float, shard: float) -> float:
        return shard

    def parameter_traffic(self, params: float, matrices: float, micro_batches: int) -> Iterator[Collective]:
        return self._parameter_traffic(params, self._wire_bytes(params, matrices) * micro_batches)


ENGINES.register("zero2", Zero2Config, ZeroEngine)
