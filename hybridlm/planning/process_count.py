"""The number of processes of a run: started by a launcher, or by `hybridlm train` on this machine."""

from __future__ import annotations

from importlib.util import find_spec

from hybridlm.config.schema import Config
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.errors import ConfigError
from hybridlm.planning.layout_checks import check_batch_sizes, check_layout


def check_process_count(config: Config, size: int) -> None:
    """Check what can be known to fail with `size` processes before any of them starts.

    Raises:
        ConfigError: a number of processes that the engine, the batch or a launcher does not allow, or a package that
            the engine needs and that is not installed.
    """
    engine = config.engine
    if engine.max_processes is not None and size > engine.max_processes:
        raise ConfigError("engine.kind", f"{engine.kind} runs one process", got=f"{size} processes", expected="ddp",
                          hint="add engine=ddp, or start `hybridlm train` without a launcher (`unset WORLD_SIZE RANK`)")
    if engine.num_processes is not None and engine.num_processes != size:
        raise ConfigError("engine.num_processes", "differs from what the launcher started", got=engine.num_processes,
                          expected=str(size), hint="leave it out under a launcher")
    package = engine.required_package
    if package is not None and find_spec(package) is None:
        raise ConfigError("engine.kind", f"needs the package {package}, which is not installed", got=engine.kind,
                          hint=f"pip install 'hybridlm[{package}]'")
    check_layout(config, size)
    check_batch_sizes(config, size)


def processes_to_start(config: Config) -> int:
    """Return how many processes `hybridlm train` starts: 1 where it runs alone or a launcher has started it.

    Raises:
        ConfigError: as `check_process_count`, before anything starts.
    """
    engine = config.engine
    if engine.max_processes == 1 and (engine.num_processes or 1) > 1:
        raise ConfigError("engine.num_processes", f"{engine.kind} runs one process", got=engine.num_processes,
                          expected="1", hint="add engine=ddp")
    if engine.max_processes == 1 or RankEnvironment.from_launcher().launched:
        return 1
    gpus = _usable_gpus(engine.device)
    size = max(1, gpus) if engine.num_processes is None else engine.num_processes
    if size < 1:
        raise ConfigError("engine.num_processes", "must be at least 1", got=size)
    if 0 < gpus < size:
        raise ConfigError("engine.num_processes", "more processes than GPUs on this machine", got=size,
                          expected=f"at most {gpus}", hint="engine.device=cpu leaves the GPUs alone")
    check_process_count(config, size)
    return size


def _usable_gpus(device: str) -> int:
    """Return the number of GPUs of this machine that processes with `engine.device` may take."""
    if device == "cpu":
        return 0
    import torch  # slow to import, and not needed where no GPU is asked for

    return torch.cuda.device_count()
