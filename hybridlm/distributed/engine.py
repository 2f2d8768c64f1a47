"""Who runs a step: devices, precision, accumulation, and (one process here) the sums over ranks.

The trainer sees this face alone. Everything that knows about processes stands behind it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from hybridlm.config.schema import EngineConfig
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from hybridlm.training.optimizer import OptimizerSet


class BatchLike(Protocol):
    """What the engine must know of a batch: how to move it."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Any: ...


@dataclass
class Contribution:
    """What one part of a step's batch gives: all of it adds up over parts (and ranks) to the whole batch's."""

    loss: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Update:
    """What an optimizer step did. `applied` is False where a loss or gradient was not finite: nothing changed."""

    values: dict[str, float]
    grad_norm: float
    applied: bool


Objective = Callable[[nn.Module, Any], Contribution]


def pick_device(config: EngineConfig) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device", "torch sees no GPU", got="cuda", expected="cpu, or auto",
                          hint="`hybridlm doctor` shows what torch sees")
    use_gpu = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


def pick_precision(asked: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that computes in it, else fp32."""
    if asked == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"
    return asked


def check_fp32(model: nn.Module, names: Sequence[str]) -> None:
    """Some engines cast every parameter: raise RuntimeError naming one that must be fp32 and is not."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in names:
        if tensors[name].dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"the engine left '{name}' in {tensors[name].dtype}; it must stay float32")


class Engine:
    """Accelerate with one process. bf16 means autocast over fp32 master weights."""

    rank = 0
    world_size = 1
    is_main = True

    def __init__(self, config: EngineConfig, precision: str = "auto"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        self.device = pick_device(config)
        self.precision = pick_precision(precision, self.device)
        AcceleratorState._reset_state(reset_partial_state=True)  # a process may run several engines in turn
        self.accelerator = Accelerator(mixed_precision="bf16" if self.precision == "bf16" else "no",
                                       cpu=self.device.type == "cpu")
        if self.accelerator.num_processes != 1:
            raise ConfigError("engine.kind", "runs one process", got=f"{self.accelerator.num_processes} processes",
                              hint="start `hybridlm train` directly, without a launcher")
        self.model: nn.Module = nn.Module()  # as Accelerate gives it back
        self.bare: nn.Module = self.model  # as it was handed in
        self.optimizers: OptimizerSet | None = None

    def prepare(self, model: nn.Module, optimizers: OptimizerSet | None, fp32_names: Sequence[str] = ()) -> None:
        """Take over the model and the optimizers of a stage.

        Raises:
            RuntimeError: a parameter that must stay fp32 does not; the text names it.
        """
        self.release()
        self.bare = model
        self.model = self.accelerator.prepare_model(model)
        if optimizers is not None:
            optimizers.members = [self.accelerator.prepare_optimizer(member) for member in optimizers.members]
        self.optimizers = optimizers
        check_fp32(model, fp32_names)

    def release(self) -> None:
        """Give the model back as it was before `prepare`."""
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # what Accelerate puts over it
            self.bare.__dict__.pop(name, None)
        self.accelerator.free_memory()
        self.model = self.bare = nn.Module()
        self.optimizers = None

    def rows(self, batch_size: int) -> range:
        """Which samples of a global batch this rank computes."""
        return range(batch_size)

    def seed(self, seed: int, step: int) -> None:
        """Random numbers of a step are a function of (seed, step): resume has no generator to restore."""
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)

    def move(self, batch: Any) -> Any:
        return batch.to(self.device, non_blocking=True)

    def gradients(self, objective: Objective, parts: Sequence[BatchLike]) -> dict[str, Tensor]:
        """Forward and backward over the parts of a global batch; the summed values of their contributions."""
        totals: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                contribution = objective(self.model, self.move(part))
                self.accelerator.backward(contribution.loss)
            values = {"loss": contribution.loss.detach(), **contribution.values}
            totals = {key: value.float() + totals.get(key, 0.0) for key, value in values.items()}
        return totals

    def update(self, values: dict[str, Tensor], *, lr: float, clip: float, balance: bool = True) -> Update:
        """Clip the gradients and step, unless a loss or gradient is not finite; then only forget the gradients.

        `values` (from `gradients`) come back as numbers, in one transfer with the gradient norm.
        """
        assert self.optimizers is not None
        grads = [p.grad for p in self.optimizers.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        numbers = torch.stack([norm.float(), *values.values()]).tolist()
        named = dict(zip(values, numbers[1:], strict=True))
        applied = math.isfinite(numbers[0]) and math.isfinite(named["loss"])
        if applied:
            if 0 < clip < numbers[0]:
                torch._foreach_mul_(grads, clip / numbers[0])
            self.optimizers.set_lr(lr)
            self.optimizers.step()
        self.optimizers.zero_grad()
        after = getattr(self.bare, "post_optimizer_step", None)
        if after is not None:
            after(update=applied and balance)
        return Update(named, numbers[0], applied)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, without gradients."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.model.train()

    def peak_memory(self) -> int:
        """Bytes: the device's peak allocation, or the process's peak resident size on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
