"""Engine `ddp`: every process holds the whole model and computes its rows of the batch (DistributedDataParallel)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from hybridlm.distributed.engine_config import ENGINES, FP32_BYTES, Collective, EngineConfig, RankMemory, StepMemory
from hybridlm.distributed.engines.single import SingleConfig, SingleEngine
from hybridlm.distributed.expert_parallel import expert_parameters
from hybridlm.distributed.static_bucket_ddp import StaticBucketDDP


@dataclass(kw_only=True)
class DDPConfig(EngineConfig):
    """Several processes that each hold the whole model."""

    kind: Literal["ddp"] = "ddp"  # type: ignore[mutable-override]
    max_processes: ClassVar[int | None] = None

    def rank_memory(self, step: StepMemory) -> RankMemory:
        # DistributedDataParallel's buckets hold every gradient once more.
        buckets = FP32_BYTES * step.local_params if step.ranks > 1 else 0.0
        return replace(SingleConfig().rank_memory(step), buffers=buckets)

    def parameter_traffic(self, params: float, matrices: float, micro_batches: int) -> Iterator[Collective]:
        yield Collective("gradients", "all_reduce", FP32_BYTES * params)


class DDPEngine(SingleEngine):
    """Sums gradients over ranks beside the backward; experts of other ranks are summed among those that hold them."""

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return model
        # `average_gradients` sums the gradients of sharded experts, over the ranks that hold the same ones.
        sharded = [] if self.experts is None else list(expert_parameters(self.model))
        trains_others = any(p.requires_grad for name, p in self.model.named_parameters() if name not in sharded)
        return StaticBucketDDP(model, self.device, sharded) if trains_others else model

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            yield
        if last and isinstance(self.wrapped, StaticBucketDDP):
            self.wrapped.check_gradients()
        if last and self.experts is not None:
            self.experts.average_gradients(self.model)

    def _gradient_norm(self, parameters: Sequence[Tensor]) -> Tensor:
        if self.experts is None:
            return super()._gradient_norm(parameters)
        return self.experts.total_norm(parameters, self.model)


ENGINES.register("ddp", DDPConfig, DDPEngine)
