"""Engine `zero1`: every process holds weights and gradients; optimizer state is sharded (ZeRO-1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from hybridlm.distributed.engine_config import ENGINES, Collective
from hybridlm.distributed.zero.config import ZeroConfig
from hybridlm.distributed.zero.engine import ZeroEngine


@dataclass(kw_only=True)
class Zero1Config(ZeroConfig):
    """DeepSpeed ZeRO-1: optimizer state is sharded."""

    kind: Literal["zero1"] = "zero1"  # type: ignore[mutable-override]
    stage: ClassVar[int] = 1

    def _gradient_bytes(self, weights: float, shard: float) -> float:
        return weights + shard  # all gradients, and a copy of those that this rank's optimizer reads

    def parameter_traffic(self, params: float, matrices: float, micro_batches: int) -> Iterator[Collective]:
        return self._parameter_traffic(params, self._wire_bytes(params, matrices))


ENGINES.register("zero1", Zero1Config, ZeroEngine)
