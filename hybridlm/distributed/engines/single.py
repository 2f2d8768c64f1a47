"""Engine `single`: one process on one device, through Accelerate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridlm.distributed.engine import Engine, Update, check_fp32
from hybridlm.distributed.engine_config import ENGINES, FP32_BYTES, Collective, EngineConfig, RankMemory, StepMemory
from hybridlm.optimizers.optimizer_set import OptimizerSet
from hybridlm.tensor_storage import StoredTensor


@dataclass(kw_only=True)
class SingleConfig(EngineConfig):
    """One process on one device."""

    kind: Literal["single"] = "single"  # type: ignore[mutable-override]
    max_processes: ClassVar[int | None] = 1

    def rank_memory(self, step: StepMemory) -> RankMemory:
        weights = FP32_BYTES * step.local_params
        return RankMemory(weights=weights + step.bf16_copies, gradients=weights,
                          optimizer=step.optimizer * step.local_params / step.params)

    def parameter_traffic(self, params: float, matrices: float, micro_batches: int) -> Iterator[Collective]:
        return iter(())


class SingleEngine(Engine):
    """Trains in this process alone; `ddp` builds on it."""

    def prepare(self, model: nn.Module, optimizers: OptimizerSet | None, fp32_names: Sequence[str] = (),
                state: Mapping[str, StoredTensor] | None = None, *, strict: bool = True) -> None:
        self._attach(model)
        # evaluation_mode: with autocast, but without Accelerate's own DistributedDataParallel around it
        self.wrapped = self._wrap(self.accelerator.prepare_model(model, evaluation_mode=True))
        if optimizers is not None:
            optimizers.members = [self.accelerator.prepare_optimizer(member) for member in optimizers.members]
            optimizers.load_state_tensors(state or {}, strict=strict)
        self.optimizers = optimizers
        check_fp32(model, fp32_names)

    def _wrap(self, model: nn.Module) -> nn.Module:
        """Return the module that a step calls: by default the prepared model itself."""
        return model

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        yield

    def update(self, values: dict[str, Tensor], *, lr: float, clip: float, balance: bool = True) -> Update:
        assert self.optimizers is not None
        parameters = self.optimizers.parameters()
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = self._gradient_norm(parameters)
        numbers = torch.stack([norm.float(), *values.values()]).tolist()
        grad_norm = numbers[0]
        named = dict(zip(values, numbers[1:], strict=True))
        applied = math.isfinite(grad_norm) and math.isfinite(named["loss"])
        if applied:
            if 0 < clip < grad_norm:
                torch._foreach_mul_(grads, clip / grad_norm)
            self.optimizers.set_lr(lr)
            self.optimizers.step()
        self.optimizers.zero_grad()
        return self._end_step(Update(named, grad_norm, applied), balance)

    def _gradient_norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the norm of all gradients together, [] in the gradients' dtype."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


ENGINES.register("single", SingleConfig, SingleEngine)
