"""Options every engine has, and what an engine's config answers before anything is built.

An engine is a kind: one file in `engines/` with a config class that derives from `EngineConfig` and a class that
derives from `hybridlm.distributed.engine.Engine`, registered together in `ENGINES`. No other file names an engine's
kind: memory estimates, traffic estimates and checks ask the methods below. Nothing here needs torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from hybridlm.errors import require
from hybridlm.kind_registry import KindRegistry
from hybridlm.optimizers.contract import OptimizerConfig

FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Sizes of a training step from which an engine estimates the memory of one rank.

    `params`: parameters of the whole model. `local_params`: those that one rank works with, so without the routed
    experts that other ranks of its expert-parallel group have. `layer_params`: those of the largest layer, likewise.
    `bf16_copies`: bytes of the bf16 copies that autocast makes of the weights. `optimizer`: bytes of the optimizer
    state of `params`, undivided.
    """

    ranks: int
    params: int
    local_params: float
    layer_params: float
    bf16_copies: float
    optimizer: float
    activation_checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes one rank needs in a training step: on its device, and on the host in `host` and `snapshot`.

    `gathered`: weights that ZeRO-3 puts together for a while, at least those of one layer. `buffers`: what gradients
    travel in. `host`: what is offloaded. `snapshot`: what the host keeps while a checkpoint is written.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float = 0.0
    buffers: float = 0.0
    activations: float = 0.0
    host: float = 0.0
    snapshot: float = 0.0

    def to_dict(self) -> dict[str, int]:
        """Return whole bytes by name: the parts on the device, their `total`, then those on the host."""
        parts = {field.name: round(getattr(self, field.name)) for field in fields(self)}
        host = {name: parts.pop(name) for name in ("host", "snapshot")}
        return parts | {"total": sum(parts.values())} | host


@dataclass(frozen=True)
class Collective:
    """One kind of collective operation on parameters: `tensor` says which ("weights" or "gradients"), `payload` is the
    bytes of the whole tensors that one rank hands to it in one training step."""

    tensor: str
    kind: Literal["all_reduce", "all_gather", "reduce_scatter"]
    payload: float


@dataclass(kw_only=True)
class EngineConfig(ABC):
    """Options of every engine: the program that runs a training step on one process or several.

    Args:
        kind: which engine.
        num_processes: processes to start on this machine; null: the number of GPUs. A launcher (torchrun) decides
            by itself.
        timeout: seconds after which a rank that waits for another one gives up.
        device: where the model computes; auto: a GPU where there is one.
        expert_parallel: ranks over which the routed experts of each layer are split.
        context_parallel: ranks over which every row of a batch is split.
    """

    kind: str
    num_processes: int | None = None
    timeout: float = 600.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    expert_parallel: int = 1
    context_parallel: int = 1

    max_processes: ClassVar[int | None] = None  # null: as many as there are
    why_not_compiled: ClassVar[str | None] = None  # the reason why layers cannot be compiled under it
    required_package: ClassVar[str | None] = None  # also the name of the extra that installs it

    def __post_init__(self) -> None:
        require(0 < self.timeout < math.inf, "timeout", "must be positive and finite", got=self.timeout)

    @property
    def matrix_bytes(self) -> int:
        """Bytes per element in which gradients of the matrices that autocast multiplies travel between ranks."""
        return FP32_BYTES

    def check_run(self, optimizer: OptimizerConfig, precision: str) -> None:
        """Check the engine's options against the run's optimizer and `training.precision`.

        Raises:
            ConfigError: an option that the optimizer or the precision does not allow; its key counts from the run's
                config ("engine.offload_optimizer").
        """
        return None  # most options go with every optimizer and precision

    @abstractmethod
    def rank_memory(self, step: StepMemory) -> RankMemory:
        """Estimate what one rank holds of weights, gradients and optimizer state, without activations and snapshot."""

    @abstractmethod
    def parameter_traffic(self, params: float, matrices: float, micro_batches: int) -> Iterator[Collective]:
        """Yield the collective operations of one training step on `params` parameters.

        Args:
            params: parameters whose weights and gradients the ranks of one group share.
            matrices: how many of them belong to matrices that autocast multiplies (see `matrix_bytes`).
            micro_batches: forwards, each with its backward, in one step.
        """


ENGINES = KindRegistry("engine", EngineConfig, default="single")
