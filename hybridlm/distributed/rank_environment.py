"""Which process this is among those that train together, by the variables that launchers set.

torchrun, accelerate launch, deepspeed and our own launcher (launch.py) all set RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

from hybridlm.config.schema import ZERO, Config
from hybridlm.errors import ConfigError, counted, require


@dataclass(frozen=True)
class RankEnvironment:
    """`launched`: a launcher has started this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False

    @classmethod
    def here(cls) -> RankEnvironment:
        """From the environment.

        Raises:
            ConfigError: variables that are no numbers, or a rank outside of the world.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except ValueError:
            raise ConfigError("engine", "RANK, WORLD_SIZE and LOCAL_RANK must be numbers",
                              got={name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
                              hint="start `hybridlm train` through torchrun, or without a launcher") from None
        if not 0 <= rank < size:
            raise ConfigError("engine", "RANK must be below WORLD_SIZE", got=f"rank {rank} of {size}")
        return cls(rank, size, local, launched=True)


def check_world(config: Config, size: int) -> None:
    """What can be known to fail before any process starts.

    Raises:
        ConfigError: a number of processes that the engine, the batch or a launcher does not fit.
    """
    engine = config.engine
    if engine.kind == "single" and size > 1:
        raise ConfigError("engine.kind", "single runs one process", got=f"{size} processes", expected="ddp",
                          hint="add engine=ddp, or start `hybridlm train` without a launcher")
    if engine.num_processes is not None and engine.num_processes != size:
        raise ConfigError("engine.num_processes", "differs from what the launcher started", got=engine.num_processes,
                          expected=str(size), hint="leave it out under a launcher")
    if engine.kind in ZERO and find_spec("deepspeed") is None:
        raise ConfigError("engine.kind", "needs DeepSpeed, which is not installed", got=engine.kind,
                          hint="pip install 'hybridlm[deepspeed]'")
    check_layout(config, size)
    shards = engine.context_parallel
    sizes = {"training.batch_size": config.training.batch_size} | {
        f"recipe.stages.{i}.batch_size": stage.batch_size for i, stage in enumerate(config.recipe.stages)
        if stage.batch_size is not None}
    for key, batch_size in sizes.items():
        if batch_size % (size // shards):
            whom = "processes" if shards == 1 else f"processes over engine.context_parallel ({size} / {shards})"
            raise ConfigError(key, f"must be a multiple of the number of {whom}", got=batch_size,
                              expected=f"a multiple of {size // shards}")


def check_layout(config: Config, size: int) -> None:
    """That experts and rows of the model can be split over `size` processes as the engine says.

    Raises:
        ConfigError: they cannot; it lists what would fit.
    """
    _check_experts(config, size)
    _check_context_parallel(config)
    shards = config.engine.context_parallel
    if size % shards:
        raise ConfigError("engine.context_parallel", "must divide the number of processes", got=shards,
                          expected=f"a divisor of {size}")


def _check_experts(config: Config, size: int) -> None:
    ranks, experts = config.engine.expert_parallel, getattr(config.model.feed_forward, "num_experts", 1)
    fitting = [n for n in range(1, size + 1) if size % n == 0 and experts % n == 0]
    if ranks not in fitting:
        raise ConfigError("engine.expert_parallel", f"must divide the {counted(experts, 'expert')} of a layer and the "
                          "number of processes", got=ranks, expected=f"one of {', '.join(map(str, fitting))}")


def _check_context_parallel(config: Config) -> None:
    """Raise ConfigError unless every row and every mixer of the model can be split `engine.context_parallel` times."""
    shards = config.engine.context_parallel
    require(shards >= 1, "engine.context_parallel", "must be at least 1", got=shards)
    if shards == 1:
        return
    lengths = {"training.sequence_length": config.training.sequence_length} | {
        f"recipe.stages.{i}.sequence_length": stage.sequence_length for i, stage in enumerate(config.recipe.stages)
        if stage.sequence_length is not None}
    for key, length in lengths.items():
        if length % shards:
            raise ConfigError(key, "must divide into engine.context_parallel equal shards", got=length,
                              expected=f"a multiple of {shards}")
    for name in dict.fromkeys([*config.model.layers(), *filter(None, [config.model.mtp.mixer])]):
        try:
            config.model.mixers[name].check_context_parallel(shards, min(lengths.values()) // shards)
        except ConfigError as error:
            raise error.within(f"model.mixers.{name}") from None


def processes_to_start(config: Config) -> int:
    """How many processes `hybridlm train` starts itself: one where it runs alone or a launcher has started it.

    Raises:
        ConfigError: as `check_world`, before anything starts.
    """
    if RankEnvironment.here().launched or config.engine.kind == "single":
        if config.engine.kind == "single" and (config.engine.num_processes or 1) > 1:
            raise ConfigError("engine.num_processes", "single runs one process", got=config.engine.num_processes,
                              expected="1", hint="add engine=ddp")
        return 1
    gpus, asked = _gpus(config.engine.device), config.engine.num_processes
    size = max(1, gpus) if asked is None else asked
    if size < 1:
        raise ConfigError("engine.num_processes", "must be at least 1", got=size)
    if 0 < gpus < size:
        raise ConfigError("engine.num_processes", "more processes than GPUs on this machine", got=size,
                          expected=f"at most {gpus}", hint="engine.device=cpu leaves the GPUs alone")
    check_world(config, size)
    return size


def _gpus(device: str) -> int:
    """GPUs of this machine that processes of `device` take."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()
