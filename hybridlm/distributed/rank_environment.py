"""The place of this process among those that train together, by the variables that launchers set.

torchrun, accelerate launch, deepspeed and our own launcher (launch.py) all set RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from hybridlm.errors import ConfigError


@dataclass(frozen=True)
class RankEnvironment:
    """Rank of this process, number of processes (`size`), rank on this machine, and whether a launcher has started it.

    >>> RankEnvironment()
    RankEnvironment(rank=0, size=1, local_rank=0, launched=False)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False

    @classmethod
    def from_launcher(cls) -> RankEnvironment:
        """Read the variables that a launcher has set; without them this process runs alone.

        Raises:
            ConfigError: variables that are no numbers, or a rank that is not below WORLD_SIZE.
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
