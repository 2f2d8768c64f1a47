"""The contract of an engine, and what all engines share: device, precision, accumulation, sums over ranks.

The trainer sees this class alone; everything that knows about processes stands behind it. The engines are files of
`engines/`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybridlm.distributed.communicator import Communicator
from hybridlm.distributed.context_parallel import ContextParallelGroup
from hybridlm.distributed.engine_config import EngineConfig
from hybridlm.distributed.expert_parallel import ExpertParallel
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.distributed.rendezvous import rendezvous
from hybridlm.distributed.shell_variables import describe_ignored, settings_hidden
from hybridlm.distributed.watchdog import Watchdog
from hybridlm.errors import ConfigError, UserError
from hybridlm.optimizers.optimizer_set import OptimizerSet
from hybridlm.tensor_storage import StoredTensor

log = logging.getLogger("hybridlm")


class BatchLike(Protocol):
    """A batch, of which an engine must know only how to move it to a device."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Any: ...


@dataclass
class Contribution:
    """Loss and other values of one micro batch, scaled so that they add up over micro batches and ranks to the values
    of the global batch."""

    loss: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Update:
    """Result of an optimizer step. `applied` is False where a loss or gradient was not finite: nothing changed."""

    values: dict[str, float]
    grad_norm: float
    applied: bool


LossFunction = Callable[[nn.Module, Any], Contribution]  # from the model and a micro batch


def pick_device(config: EngineConfig, local_rank: int = 0) -> torch.device:
    """Return the device of this process.

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
    """Return "fp32" or "bf16"; "auto" becomes bf16 on a GPU that computes in it, else fp32."""
    if asked == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"
    return asked


def check_fp32(model: nn.Module, names: Sequence[str]) -> None:
    """Raise RuntimeError naming a tensor that must be fp32 and is not: some engines cast every parameter."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in names:
        if tensors[name].dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"the engine left '{name}' in {tensors[name].dtype}; it must stay float32")


def assign_owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Give each name a rank so that all ranks have about the same sum of sizes: the largest first, each to the rank
    with the least so far.

    >>> assign_owners({"a": 3, "b": 2, "c": 2}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    load = [0] * ranks
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def lost_rank(error: RuntimeError) -> bool:
    """Tell whether a collective operation failed because another rank is gone or hangs."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))


class Engine(Communicator, ABC):
    """Runs training steps of a model in this process, alone or together with other ranks.

    An engine knows the model twice: `model` is the module it was handed, with its own parameter names; `wrapped` is
    what a step calls: the same module behind autocast and, by engine, DistributedDataParallel or DeepSpeed.

    Contributions of micro batches add up: over the micro batches of a rank here, over ranks by sums, never by means.
    bf16 is autocast over fp32 weights under every engine. All ranks call the methods together, in the same order.

    Args:
        config: options of the engine.
        precision: "fp32", "bf16", or "auto": bf16 on a GPU that computes in it.

    Raises:
        ConfigError: a device or a package that is not there, or other ranks that do not answer.
    """

    settings: dict[str, Any] | None = None  # configuration handed to another program's engine (DeepSpeed)
    needs_process_group: ClassVar[bool] = False  # also for a single process

    def __init__(self, config: EngineConfig, precision: str = "auto"):
        from accelerate import Accelerator, InitProcessGroupKwargs  # a slow import, needed only where a step runs
        from accelerate.state import AcceleratorState

        self.config = config
        environment = RankEnvironment.from_launcher()
        self.rank, self.world_size, self.is_main = environment.rank, environment.size, environment.rank == 0
        self.device = pick_device(config, environment.local_rank)
        self.precision = pick_precision(precision, self.device)
        AcceleratorState._reset_state(reset_partial_state=True)  # a process may run several engines in turn
        handlers = []
        if ignored := describe_ignored(os.environ):
            log.warning("%s", ignored)
        if environment.has_peers or self.needs_process_group:
            os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))  # a cluster with one process per pod
            backend = "gloo" if self.device.type == "cpu" else "nccl"
            handlers = [InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=config.timeout))]
        with rendezvous(environment, config.timeout), self._settings_hidden():
            self.accelerator = Accelerator(kwargs_handlers=handlers, **self._accelerator_options(config))
        if self.accelerator.num_processes != self.world_size:
            raise RuntimeError(f"Accelerate runs {self.accelerator.num_processes} processes of {self.world_size}")
        self.watchdog = Watchdog(self.rank, self.world_size, config.timeout) if self.world_size > 1 else None
        self.context_parallel_size = config.context_parallel
        self.shard_group = None
        if config.context_parallel > 1:
            self.shard_group = ContextParallelGroup.make(config.context_parallel)
        self.experts = self._make_expert_groups(config.expert_parallel) if config.expert_parallel > 1 else None
        self.model: nn.Module = nn.Module()  # an empty one until `prepare`
        self.wrapped: nn.Module = self.model
        self._attached = False
        self.optimizers: OptimizerSet | None = None

    def _settings_hidden(self) -> contextlib.AbstractContextManager[None]:
        """Surround calls of Accelerate and DeepSpeed, which otherwise take settings from the shell."""
        return settings_hidden(process_group=self.world_size > 1 or self.needs_process_group)

    def _accelerator_options(self, config: EngineConfig) -> dict[str, Any]:
        """Return the keyword arguments of `Accelerator`."""
        return {"mixed_precision": "bf16" if self.precision == "bf16" else "no", "cpu": self.device.type == "cpu"}

    def _make_expert_groups(self, size: int) -> ExpertParallel:
        return ExpertParallel.make(size)

    # --- where ranks stand in the batch

    @property
    def dp_size(self) -> int:
        """Groups of ranks among which a global batch is divided; the ranks of one group share its rows."""
        return self.world_size // self.context_parallel_size

    @property
    def dp_rank(self) -> int:
        """The number, below `dp_size`, of the group that this rank belongs to."""
        return self.rank // self.context_parallel_size

    def local_rows(self, batch_size: int) -> range:
        """Return the rows of a global batch that this rank's group computes: equally many for each group, in order."""
        rows_per_group = batch_size // self.dp_size
        return range(self.dp_rank * rows_per_group, (self.dp_rank + 1) * rows_per_group)

    # --- a model and its optimizers

    def shard_experts(self, model: nn.Module) -> None:
        """Drop the experts that other ranks hold, before the model's weights are allocated."""
        if self.experts is not None:
            self.experts.shard_experts(model)

    def shard_weights(self, module: nn.Module) -> None:
        """Keep only this rank's shard of a module's weights, as soon as they have their values; by default all of them.

        All ranks call it together. A module whose weights are sharded already stays as it is.
        """

    def local_shard(self, name: str, tensor: StoredTensor) -> StoredTensor:
        """Return the slice of a stored tensor that belongs to this rank's experts; any other tensor as it is.

        `name` is that of a parameter, or of its optimizer state, `{key}/{parameter}`.
        """
        return tensor if self.experts is None else self.experts.local_shard(name, tensor)

    @abstractmethod
    def prepare(self, model: nn.Module, optimizers: OptimizerSet | None, fp32_names: Sequence[str] = (),
                state: Mapping[str, StoredTensor] | None = None, *, strict: bool = True) -> None:
        """Take over a model and the optimizers of a stage.

        Args:
            model: the module to train, as `build_model` made it.
            optimizers: over the parameters that train; None for a model that is only evaluated.
            fp32_names: parameters that must be in fp32 afterwards.
            state: saved optimizer state by `{key}/{parameter}`, of which only this rank's elements are read.
            strict: refuse state that has no place; False passes over it (a new stage).

        Raises:
            RuntimeError: a parameter that must stay fp32 does not; the text names it.
            CheckpointError: state that does not fit the optimizers.
        """

    def _attach(self, model: nn.Module) -> None:
        """Let go of the model before, and make the new one compute its shards of rows."""
        self.release()
        self.model, self._attached = model, True
        model.shard_group = self.shard_group  # type: ignore[assignment]

    def release(self) -> None:
        """Give the model back as it was before `prepare`: weights complete, or sharded as `shard_weights` left them.

        Without a model it does nothing; Accelerate would collect garbage, which takes long in a large process.
        """
        if not self._attached:
            return
        if self.watchdog is not None:
            self.watchdog.pause()
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # what Accelerate puts over it
            self.model.__dict__.pop(name, None)
        self.model.shard_group = None  # type: ignore[assignment]
        self.accelerator.free_memory()
        self.model = self.wrapped = nn.Module()
        self._attached = False
        self.optimizers = None

    # --- what checkpoints hold

    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's elements of the prepared model's parameters and buffers, by name."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def owned_tensors(self, weights: Mapping[str, Tensor], *, copied: bool = False) -> dict[str, Tensor]:
        """Return the complete tensors that this rank writes to a checkpoint; each of `weights` has one such rank.

        Args:
            weights: tensors of the model, or of its optimizer state, by name; the same names on all ranks.
            copied: return copies on the host, which stay as they are when training goes on.
        """
        sizes = {name: getattr(w, "ds_numel", w.numel()) for name, w in weights.items()}
        owner = assign_owners(sizes, self.world_size)
        owned = {}
        for name, weight in weights.items():
            complete = self._gather_tensor(name, weight)
            if owner[name] == self.rank:
                is_live = complete is weight  # no copy was made yet: training would change it
                keep = is_live and not copied
                owned[name] = complete if keep else complete.detach().to("cpu", copy=is_live)
        return owned

    def owned_optimizer_state(self, *, copied: bool = False) -> dict[str, Tensor]:
        """Return the optimizer state that this rank writes, by `{key}/{parameter}`; otherwise as `owned_tensors`."""
        return {} if self.optimizers is None else self.owned_tensors(self.optimizers.state_tensors(), copied=copied)

    def _gather_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return the complete tensor on all ranks that hold a shard of it, which call this together."""
        return tensor if self.experts is None else self.experts.gather_experts(name, tensor)

    # --- a step

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first rank go through the block before the others, which raise its UserError instead of following."""
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

    def begin_step(self, seed: int, step: int) -> None:
        """Start a step: its random numbers are a function of (seed, step), so resume has no generator to restore."""
        if self.watchdog is not None:
            self.watchdog.beat(step + 1)
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)

    def move(self, batch: Any) -> Any:
        """Return the batch on the engine's device."""
        return batch.to(self.device, non_blocking=True)

    def compute_gradients(self, compute_loss: LossFunction, micro_batches: Sequence[BatchLike]) -> dict[str, Tensor]:
        """Run forward and backward over this rank's micro batches of a global batch.

        Returns:
            The values of all contributions, those of other ranks included, summed by name; `loss` is among them.
        """
        totals: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            if self.watchdog is not None:
                self.watchdog.beat()
            last = index == len(micro_batches) - 1
            with self._accumulating(last):
                contribution = compute_loss(self.wrapped, self.move(micro_batch))
                # The mean over ranks that DistributedDataParallel and DeepSpeed take becomes a sum.
                self.backward(contribution.loss * self.world_size)
            values = {"loss": contribution.loss.detach(), **contribution.values}
            totals = {key: value.float() + totals.get(key, 0.0) for key, value in values.items()}
        return self._sum_over_ranks(totals)

    @abstractmethod
    def _accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Surround the forward and backward of a micro batch; gradients are summed over ranks in the last one."""

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of a loss that `self.wrapped` gave, averaged over ranks unless more micro batches come."""
        self.accelerator.backward(loss)

    def _sum_over_ranks(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the values over ranks, and with them what the model's routers have counted, in place."""
        if self.world_size == 1:
            return totals
        sums: list[Tensor] = getattr(self.model, "step_sums", list)()
        summed = torch.cat([torch.stack(list(totals.values())).double(), *sums])  # counts are exact in fp64
        dist.all_reduce(summed)
        values, *found = summed.split([len(totals), *(total.numel() for total in sums)])
        for total, over_ranks in zip(sums, found, strict=True):
            total.copy_(over_ranks)
        return dict(zip(totals, values.float().unbind(), strict=True))

    @abstractmethod
    def update(self, values: dict[str, Tensor], *, lr: float, clip: float, balance: bool = True) -> Update:
        """Clip the gradients and step, unless a loss or gradient is not finite; then only forget the gradients.

        Args:
            values: from `compute_gradients`; they come back as numbers, in one transfer with the gradient norm.
            lr: learning rate of the step.
            clip: largest norm of all gradients together; 0 does not clip.
            balance: let the routers of experts adjust their biases.
        """

    def _end_step(self, update: Update, balance: bool) -> Update:
        after = getattr(self.model, "post_optimizer_step", None)
        if after is not None:
            after(update=update.applied and balance)
        if self.watchdog is not None:
            self.watchdog.pause()
        return update

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Compute in the precision of the run, for models that this engine has not prepared."""
        return self.accelerator.autocast()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yield the model in evaluation mode, without gradients."""
        self.wrapped.eval()
        try:
            with torch.no_grad():
                yield self.wrapped
        finally:
            self.wrapped.train()

    def peak_memory(self) -> int:
        """Return the device's peak allocation in bytes, or the process's peak resident size on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
