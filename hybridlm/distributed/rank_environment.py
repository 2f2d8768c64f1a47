"""The place of this process among those that train together, by the variables that launchers set.

torchrun, accelerate launch, deepspeed and our own launcher (launch.py) all set RANK, WORLD_SIZE and LOCAL_RANK.
Variables that a cluster or an earlier program left around a process that trains alone start nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hybridlm.errors import ConfigError

# Launchers that start several processes without telling them what torch needs, and the variable with their number.
FOREIGN_LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE",
                     "mpirun_rsh": "MV2_COMM_WORLD_SIZE"}


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
    def from_launcher(cls, environment: Mapping[str, str] | None = None) -> RankEnvironment:
        """Read the variables that a launcher has set; without them this process runs alone.

        WORLD_SIZE=1 without LOCAL_RANK comes from a cluster around one process (a pod of Kubeflow), not from a
        launcher: this process runs alone, and may start ranks of its own.

        Args:
            environment: the variables; None: those of this process.

        Raises:
            ConfigError: variables that are no numbers, a rank that is not below WORLD_SIZE, a WORLD_SIZE above 1
                without what belongs to it, or a launcher that started several processes and told them no ranks.

        >>> RankEnvironment.from_launcher({"WORLD_SIZE": "1"}).launched
        False
        >>> RankEnvironment.from_launcher({"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
        RankEnvironment(rank=2, size=4, local_rank=0, launched=True)
        """
        variables = os.environ if environment is None else environment
        if not variables.get("WORLD_SIZE"):
            _refuse_foreign_launcher(variables)
            return cls()
        given = {name: variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if variables.get(name)}
        try:
            rank, size, local = (int(given.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except ValueError:
            raise ConfigError("engine", "RANK, WORLD_SIZE and LOCAL_RANK must be numbers", got=given,
                              hint="start `hybridlm train` through torchrun, or unset them") from None
        if not 0 <= rank < size:
            raise ConfigError("engine", "RANK must be below WORLD_SIZE", got=f"rank {rank} of {size}",
                              hint="start `hybridlm train` through torchrun, or unset both")
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
        if size > 1 and missing:
            raise ConfigError("engine", f"WORLD_SIZE stands in the environment without {' and '.join(missing)}",
                              got=f"WORLD_SIZE={size}", expected="all that a launcher sets, or none of it",
                              hint="`unset WORLD_SIZE RANK LOCAL_RANK` to train alone, or start through torchrun")
        return cls(rank, size, local, launched=size > 1 or ("LOCAL_RANK" in given and not missing))

    @property
    def has_peers(self) -> bool:
        """Whether other processes train with this one."""
        return self.size > 1


def _refuse_foreign_launcher(variables: Mapping[str, str]) -> None:
    """Refuse to be one of several processes that know nothing of each other and would all write one run folder."""
    for program, name in FOREIGN_LAUNCHERS.items():
        count = variables.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise ConfigError("engine", f"{program} started {count} processes and told them no RANK and WORLD_SIZE",
                              got=f"{name}={count}", expected="one process, or a launcher that sets both",
                              hint="scripts/launch/slurm.sbatch and torchrun do; "
                                   f"`unset {name}` if this process is to train alone")
