"""Who runs a step: devices, precision, accumulation, and the sums over ranks.

The trainer sees this face alone. Everything that knows about processes stands behind it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybridlm.config.schema import ZERO, EngineConfig
from hybridlm.distributed.communicator import Communicator
from hybridlm.distributed.context_parallel import ContextParallelGroup
from hybridlm.distributed.expert_parallel import ExpertParallel, expert_parameters
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.distributed.rendezvous import rendezvous
from hybridlm.distributed.static_bucket_ddp import StaticBucketDDP
from hybridlm.distributed.watchdog import Watchdog
from hybridlm.errors import ConfigError, UserError
from hybridlm.optimizers.optimizer_set import OptimizerSet
from hybridlm.tensor_storage import StoredTensor


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


def pick_device(config: EngineConfig, local_rank: int = 0) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device", "torch sees no GPU", got="cuda", expected="cpu, or auto",
                          hint="`hybridlm doctor` shows what torch sees")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError("engine.num_processes", "more processes than GPUs on this machine",
                          got=f"local rank {local_rank}", expected=f"at most {torch.cuda.device_count()} processes")
    return torch.device("cuda", local_rank)


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


def assign_owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """A rank for each name, so that all have about as much: the largest first, each to whom has least."""
    load = [0] * ranks
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or hangs."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))


class Engine(Communicator):
    """Accelerate, with one process or several that hold the same weights. bf16 is autocast over fp32 masters.

    What the parts of a batch give adds up: over the parts of a rank here, over ranks by sums, never by means.
    """

    settings: dict[str, Any] | None = None  # what another program's engine is told

    def __init__(self, config: EngineConfig, precision: str = "auto"):
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState

        self.config = config
        world = RankEnvironment.here()
        self.rank, self.world_size, self.is_main = world.rank, world.size, world.rank == 0
        self.device = pick_device(config, world.local_rank)
        self.precision = pick_precision(precision, self.device)
        AcceleratorState._reset_state(reset_partial_state=True)  # a process may run several engines in turn
        handlers = [InitProcessGroupKwargs(backend="gloo" if self.device.type == "cpu" else "nccl",
                                           timeout=timedelta(seconds=config.timeout))] if world.launched else []
        with rendezvous(world, config.timeout):
            self.accelerator = Accelerator(kwargs_handlers=handlers, **self._accelerator_options(config))
        if self.accelerator.num_processes != self.world_size:
            raise RuntimeError(f"Accelerate runs {self.accelerator.num_processes} processes of {self.world_size}")
        self.watchdog = Watchdog(self.rank, self.world_size, config.timeout) if self.world_size > 1 else None
        self.context_parallel_size = config.context_parallel  # of each row, one a rank
        self.shard_group = None
        if self.context_parallel_size > 1:
            self.shard_group = ContextParallelGroup.make(self.context_parallel_size)
        self.experts = self._make_experts(config.expert_parallel) if config.expert_parallel > 1 else None
        self.model: nn.Module = nn.Module()  # as Accelerate gives it back
        self.bare: nn.Module = self.model  # as it was handed in
        self.optimizers: OptimizerSet | None = None

    def _make_experts(self, size: int) -> ExpertParallel:
        return ExpertParallel.make(size)

    def split(self, model: nn.Module) -> None:
        """Leave of a model what this rank holds: before its weights are allocated."""
        if self.experts is not None:
            self.experts.split(model)

    def divide(self, module: nn.Module) -> None:
        """Leave of a module's weights what this rank holds between steps, as soon as they have their values.

        All ranks call it together. What was divided already stays as it is.
        """

    def part(self, name: str, tensor: StoredTensor) -> StoredTensor:
        """What this rank holds of a tensor as one process has it."""
        return tensor if self.experts is None else self.experts.part(name, tensor)

    def _accelerator_options(self, config: EngineConfig) -> dict[str, Any]:
        return {"mixed_precision": "bf16" if self.precision == "bf16" else "no", "cpu": self.device.type == "cpu"}

    def prepare(self, model: nn.Module, optimizers: OptimizerSet | None, fp32_names: Sequence[str] = (),
                state: Mapping[str, StoredTensor] | None = None, *, strict: bool = True) -> None:
        """Take over the model and the optimizers of a stage.

        `state`: saved optimizer state, `{key}/{parameter}`, of which only what this rank holds is read; `strict=False`
        takes of it what has a place.

        Raises:
            RuntimeError: a parameter that must stay fp32 does not; the text names it.
            CheckpointError: state that does not fit the optimizers.
        """
        self._take(model)
        # Split experts are summed by `average_gradients`, over the ranks that hold the same ones.
        split = [] if self.experts is None else list(expert_parameters(model))
        shared = any(p.requires_grad for name, p in model.named_parameters() if name not in split)
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True)  # autocast, but no sums over ranks
        if self.world_size > 1 and shared:
            self.model = StaticBucketDDP(self.model, self.device, split)
        if optimizers is not None:
            optimizers.members = [self.accelerator.prepare_optimizer(member) for member in optimizers.members]
            optimizers.load_state_tensors(state or {}, strict=strict)
        self.optimizers = optimizers
        check_fp32(model, fp32_names)

    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of the prepared model's parameters and buffers, by name."""
        yield from self.bare.named_parameters()
        yield from self.bare.named_buffers()

    def share(self, weights: Mapping[str, Tensor], *, copied: bool = False) -> dict[str, Tensor]:
        """Those of the model's `weights` that this rank is to write, whole. All ranks call it together.

        `copied`: they are on the host and stay as they are when training goes on.
        """
        owner = assign_owners({name: getattr(w, "ds_numel", w.numel()) for name, w in weights.items()}, self.world_size)
        mine = {}
        for name, weight in weights.items():
            whole = self._whole_weight(name, weight)
            if owner[name] == self.rank:
                own = whole is weight
                mine[name] = whole if own and not copied else whole.detach().to("cpu", copy=own)
        return mine

    def optimizer_share(self, *, copied: bool = False) -> dict[str, Tensor]:
        """The optimizer state that this rank is to write, `{key}/{parameter}`, as `share`."""
        return {} if self.optimizers is None else self.share(self.optimizers.state_tensors(), copied=copied)

    def _whole_weight(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if self.experts is None else self.experts.whole(name, tensor)

    def _take(self, model: nn.Module) -> None:
        self.release()
        self.bare = model
        model.shard_group = self.shard_group  # type: ignore[assignment]

    def release(self) -> None:
        """Give the model back as it was before `prepare`: with whole weights, or divided as `divide` leaves them."""
        if self.watchdog is not None:
            self.watchdog.rest()
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # what Accelerate puts over it
            self.bare.__dict__.pop(name, None)
        self.bare.shard_group = None  # type: ignore[assignment]
        self.accelerator.free_memory()
        self.model = self.bare = nn.Module()
        self.optimizers = None

    def rows(self, batch_size: int) -> range:
        """Which samples of a global batch this rank computes, or computes shards of: an equal share, in order."""
        share = batch_size // self.replicas
        return range(self.replica * share, (self.replica + 1) * share)

    @property
    def replica(self) -> int:
        """Which of the `replicas`, groups of ranks that share their rows, this rank belongs to."""
        return self.rank // self.context_parallel_size

    @property
    def replicas(self) -> int:
        return self.world_size // self.context_parallel_size

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The first rank goes through the block before the others, which raise its UserError instead of following."""
        error: list[UserError | None] = [None]
        try:
            if self.is_main:
                yield
        except UserError as found:
            found.shared, error[0] = True, found
            raise
        finally:
            if self.world_size > 1:
                dist.broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]
        if not self.is_main:
            yield

    def seed(self, seed: int, step: int) -> None:
        """A step begins. Its random numbers are a function of (seed, step): resume has no generator to restore."""
        if self.watchdog is not None:
            self.watchdog.beat(step + 1)
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)

    def move(self, batch: Any) -> Any:
        return batch.to(self.device, non_blocking=True)

    def gradients(self, objective: Objective, parts: Sequence[BatchLike]) -> dict[str, Tensor]:
        """Forward and backward over the parts of a global batch; the summed values of their contributions."""
        totals: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            if self.watchdog is not None:
                self.watchdog.beat()
            last = index == len(parts) - 1
            with self._accumulating(last):
                contribution = objective(self.model, self.move(part))
                # The mean over ranks that DistributedDataParallel and DeepSpeed take becomes a sum.
                self.backward(contribution.loss * self.world_size)
            values = {"loss": contribution.loss.detach(), **contribution.values}
            totals = {key: value.float() + totals.get(key, 0.0) for key, value in values.items()}
        return self._over_ranks(totals)

    @contextlib.contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of a part; gradients are summed over ranks in the last one."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield
        if last and isinstance(self.model, StaticBucketDDP):
            self.model.check()
        if last and self.experts is not None:
            self.experts.average_gradients(self.bare)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss that `self.model` gave, averaged over ranks unless more parts come."""
        self.accelerator.backward(loss)

    def _over_ranks(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values, and the loads of the model's routers, summed over ranks."""
        if self.world_size == 1:
            return totals
        loads = list(getattr(self.bare, "router_loads", dict)().values())
        summed = torch.cat([torch.stack(list(totals.values())).double(), *loads])  # counts are exact in fp64
        dist.all_reduce(summed)
        values, *counts = summed.split([len(totals), *(load.numel() for load in loads)])
        for load, count in zip(loads, counts, strict=True):
            load.copy_(count)
        return dict(zip(totals, values.float().unbind(), strict=True))

    def update(self, values: dict[str, Tensor], *, lr: float, clip: float, balance: bool = True) -> Update:
        """Clip the gradients and step, unless a loss or gradient is not finite; then only forget the gradients.

        `values` (from `gradients`) come back as numbers, in one transfer with the gradient norm.
        """
        assert self.optimizers is not None
        parameters = self.optimizers.parameters()
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if self.experts is None else self.experts.total_norm(
            parameters, self.bare)
        numbers = torch.stack([norm.float(), *values.values()]).tolist()
        named = dict(zip(values, numbers[1:], strict=True))
        applied = math.isfinite(numbers[0]) and math.isfinite(named["loss"])
        if applied:
            if 0 < clip < numbers[0]:
                torch._foreach_mul_(grads, clip / numbers[0])
            self.optimizers.set_lr(lr)
            self.optimizers.step()
        self.optimizers.zero_grad()
        return self._updated(Update(named, numbers[0], applied), balance)

    def _updated(self, update: Update, balance: bool) -> Update:
        """The step's end."""
        after = getattr(self.bare, "post_optimizer_step", None)
        if after is not None:
            after(update=update.applied and balance)
        if self.watchdog is not None:
            self.watchdog.rest()
        return update

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


def make_engine(config: EngineConfig, precision: str = "auto") -> Engine:
    """The engine of `config.kind`, in the process that this is.

    Raises:
        ConfigError: a device or a package that is not there.
    """
    if config.kind not in ZERO:
        return Engine(config, precision)
    from hybridlm.distributed.zero.engine import ZeroEngine

    return ZeroEngine(config, precision)
