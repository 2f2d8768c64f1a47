"""Whether a run fits into the memory of the machine that it is planned for or starts on.

Weights, gradients and optimizer state are exact; activations are an estimate (`hybridlm/model/memory.py`) that leaves
out what lives for a moment. So a plan that exceeds the memory a little is a warning, and one is refused where its state
alone does not fit, or where the estimate exceeds the memory by more than its own error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridlm.config.schema import Config
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.errors import ConfigError
from hybridlm.inspect import BYTES, scaled
from hybridlm.model.memory import Precision
from hybridlm.planning.rank_memory import micro_batch, rank_memory

CERTAIN_FACTOR = 1.25  # estimate over memory from which there is no doubt: measured steps took 1.07 to 1.6 estimates
ADVISED_FRACTION = 0.6  # of the memory, that the estimate of advised settings may take
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # versions 2 and 1


@dataclass(frozen=True)
class _Device:
    """Memory in bytes that one process may use, where that is for a person, and whether it is the host's own.

    `precision`: what `training.precision=auto` becomes there.
    """

    available: float
    where: str
    is_host: bool
    precision: Precision


@dataclass(frozen=True)
class MemoryFit:
    """Memory that each process of a run needs beside the memory that it may use, in bytes.

    `needed`: in a training step, activations included. `state`: the exact part of it (weights, gradients, optimizer
    state). `available`: memory of the device per process. `where`: names the device for a person. `advice`: settings
    that would make it fit, as they can be typed; empty where none would.
    """

    needed: float
    state: float
    available: float
    where: str
    rows: int
    sequence_length: int
    advice: str = ""

    @property
    def exceeded(self) -> bool:
        """Whether the estimate exceeds the memory."""
        return self.needed > self.available

    @property
    def certain(self) -> bool:
        """Whether there is no doubt that the run would end for lack of memory."""
        return self.state > self.available or self.needed > CERTAIN_FACTOR * self.available

    def describe(self) -> str:
        """Say in one line what is needed, what there is, and which settings would fit."""
        text = (f"a step needs about {_bytes(self.needed)} ({_bytes(self.state)} of weights, gradients and "
                f"optimizer state, the rest for a step on {self.rows} x {self.sequence_length} tokens at a time), "
                f"and {self.where} has {_bytes(self.available)}")
        return f"{text}; {self.advice}" if self.advice else text

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {"needed": round(self.needed), "state": round(self.state), "available": round(self.available),
                "where": self.where, "exceeded": self.exceeded, "text": self.describe()}


def memory_fit(config: Config, ranks: int, *, device_bytes: float | None = None) -> MemoryFit | None:
    """Compare what each of `ranks` processes needs with the memory of its device; None where that is unknown.

    Args:
        config: the config of a run.
        ranks: its processes.
        device_bytes: memory of one device of the machine that the plan is for; None: that of this machine.
    """
    if device_bytes is None:
        device = _this_machine(config, ranks)
    else:
        on_cpu = config.engine.device == "cpu"
        device = _Device(device_bytes, "a device of the plan", is_host=on_cpu, precision="fp32" if on_cpu else "bf16")
    if device is None:
        return None
    fit = _measure(config, ranks, device)
    return replace(fit, advice=_advise(config, ranks, fit, device)) if fit.exceeded else fit


def planned_precision(config: Config, *, other_machine: bool = False) -> Precision:
    """Return the precision that a run would train in: `auto` is bf16 on a GPU, and fp32 on this machine's CPU.

    Args:
        config: the config of a run.
        other_machine: whether the plan is for another machine, which is taken to have GPUs unless `engine.device` is
            cpu.
    """
    if config.training.precision != "auto":
        return config.training.precision
    on_gpu = config.engine.device != "cpu" if other_machine else _computes_on_gpu(config)
    return "bf16" if on_gpu else "fp32"


def check_memory(config: Config, ranks: int) -> MemoryFit | None:
    """Refuse a run that this machine certainly has no memory for.

    Args:
        config: the config of a run that is about to start.
        ranks: its processes.

    Returns:
        The comparison where the estimate exceeds the memory without being certain, for a warning; None where it fits.

    Raises:
        ConfigError: the run certainly exceeds the memory.
    """
    fit = memory_fit(config, ranks)
    if fit is None or not fit.exceeded:
        return None
    if not fit.certain:
        return fit
    error = ConfigError("training.micro_batch_size" if fit.state <= fit.available else "model", fit.describe())
    error.shared = True
    raise error


def out_of_memory_advice(config: Config) -> str:
    """Name the settings that take less memory, for a run whose memory has run out."""
    training = config.training
    rows = training.micro_batch_size or training.batch_size
    ways = []
    if rows > 1:
        smaller = next(size for size in _smaller_batches(config, rows) if 2 * size <= rows)
        now = "" if training.micro_batch_size else f"; now all {rows} rows of a batch go through the model at once"
        ways.append(f"lower training.micro_batch_size, for instance training.micro_batch_size={smaller}{now}")
    if not training.activation_checkpointing:
        ways.append("set training.activation_checkpointing=true")
    if not ways:
        ways.append("take a shorter training.sequence_length or a smaller model")
    return "; or ".join(ways)


def _smaller_batches(config: Config, rows: int) -> list[int]:
    """Return the sizes of a micro batch that the config allows, from `rows` down to 1."""
    batch = config.training.batch_size
    return [size for size in range(min(rows, batch), 0, -1) if batch % size == 0]


def _measure(config: Config, ranks: int, device: _Device) -> MemoryFit:
    if config.training.precision == "auto":
        config = replace(config, training=replace(config.training, precision=device.precision))
    memory = rank_memory(config, ranks)
    rows, length = micro_batch(config, ranks)
    state = memory.weights + memory.gradients + memory.optimizer + (memory.host if device.is_host else 0.0)
    passing = memory.activations + memory.gathered + memory.buffers
    return MemoryFit(needed=state + passing, state=state, available=device.available, where=device.where,
                     rows=rows, sequence_length=length)


def _advise(config: Config, ranks: int, fit: MemoryFit, device: _Device) -> str:
    """Find settings that would fit: the largest micro batch, then the same with activation checkpointing."""
    if fit.state > fit.available:
        return "weights, gradients and optimizer state alone do not fit: no batch size helps, a smaller model does"
    for checkpointing in sorted({config.training.activation_checkpointing, True}):
        for rows in _smaller_batches(config, fit.rows):
            training = replace(config.training, micro_batch_size=rows, activation_checkpointing=checkpointing)
            smaller = _measure(replace(config, training=training), ranks, device)
            if smaller.needed <= ADVISED_FRACTION * fit.available:
                words = [f"training.micro_batch_size={rows}"] if rows < fit.rows else []
                if checkpointing and not config.training.activation_checkpointing:
                    words.append("training.activation_checkpointing=true")
                return f"{' '.join(words)} would take about {_bytes(smaller.needed)}"
    return ("training.micro_batch_size=1 with training.activation_checkpointing=true does not fit either: take a "
            "shorter training.sequence_length or a smaller model")


def _this_machine(config: Config, ranks: int) -> _Device | None:
    if _computes_on_gpu(config):
        import torch

        properties = torch.cuda.get_device_properties(RankEnvironment.from_launcher().local_rank)
        return _Device(properties.total_memory, f"one {properties.name}", is_host=False, precision="bf16")
    total = host_memory_bytes()
    if total is None:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    where = "this machine" if local == 1 else f"each of {local} processes on this machine"
    return _Device(total / local, where, is_host=True, precision="fp32")


def _computes_on_gpu(config: Config) -> bool:
    if config.engine.device == "cpu":
        return False
    import torch  # slow to import, and not needed where no GPU is asked for

    return torch.cuda.is_available()


def host_memory_bytes() -> int | None:
    """Return the memory that processes of this machine may use: RAM and swap, or the limit of its control group.

    None where the system does not say.
    """
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        total = sum(int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError):
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (OSError, ValueError):
            return None
    for file in (_own_cgroup_limit(), *CGROUP_LIMITS):
        try:
            total = min(total, int(Path(file).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return total


def _own_cgroup_limit() -> str:
    """Return the file with the limit of this process's own control group, as cluster managers set it."""
    try:
        last = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()[-1]
    except (OSError, IndexError):
        return CGROUP_LIMITS[0]
    return f"/sys/fs/cgroup{last.split(':', 2)[-1].rstrip('/')}/memory.max"


def _bytes(value: float) -> str:
    return scaled(value, 1024, BYTES)
