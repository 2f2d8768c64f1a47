"""The engines, one file each: their config classes, what they answer before a run, and how they run a step.

    single     one process
    ddp        several processes that each hold the whole model
    zero1      DeepSpeed ZeRO: optimizer state is sharded over ranks
    zero2      ... also gradients
    zero3      ... also weights
"""

from __future__ import annotations

from hybridlm.distributed.engine import Engine
from hybridlm.distributed.engine_config import ENGINES, EngineConfig
from hybridlm.distributed.engines import ddp, single, zero1, zero2, zero3  # noqa: F401  registers them


def make_engine(config: EngineConfig, precision: str = "auto") -> Engine:
    """Make the engine of `config.kind` in this process.

    Raises:
        ConfigError: a device or a package that is not there.

    >>> from hybridlm.distributed.engines.single import SingleConfig
    >>> make_engine(SingleConfig(device="cpu")).world_size
    1
    """
    return ENGINES.implementation(config.kind)(config, precision)
