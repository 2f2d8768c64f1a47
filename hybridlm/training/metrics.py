"""Measurements of a training step, and metrics.jsonl with one JSON object per step.

Loads: E experts, L layers with experts.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlm.files import write_bytes

log = logging.getLogger("hybridlm")

# Dense bf16 peaks of the makers' data sheets, in FLOP/s.
PUBLISHED_PEAKS = {
    "B200": 2250e12, "GB200": 2500e12, "H200": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}


class MetricsFile:
    """Appends records to a file; `truncate` drops those of steps that are computed again after a crash."""

    def __init__(self, path: Path):
        self.path = path
        self.lost = False

    def truncate(self, step: int) -> None:
        """Keep the records of steps up to `step`; an incomplete last line is dropped."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _step(line) <= step]
        write_bytes(self.path, b"".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. If the disk refuses, the record is lost with a warning, and the run continues."""
        line = json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self.lost = False
        except OSError as error:
            if not self.lost:
                log.warning("cannot write %s (%s): records are lost until it works again", self.path, error)
            self.lost = True

    def sync(self) -> None:
        """Flush the file to disk, before a checkpoint that the records belong to."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    """Replace NaN and infinity by None, because JSON has neither."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layer_loads(loads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the loads of a step, by the names of layers in the records.

    Args:
        loads: int64 [E] by module name, from `HybridLM.router_loads`.

    Returns:
        The loads by layer: "3" for `layers.3...`, "mtp1" for the first depth of multi-token prediction.
    """
    parts = {name: name.split(".") for name in loads}
    return {f"mtp{int(parts[name][1]) + 1}" if parts[name][0] == "mtp" else parts[name][1]: load_E.clone()
            for name, load_E in loads.items()}


def router_panel(loads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Measure how evenly the experts of each layer were used in one step; empty for a model without experts.

    `max_violation` is max load / mean load - 1, for each layer, averaged over layers, and the worst layer's;
    `dead_experts` got no token at all, counted over layers.
    """
    if not loads:
        return {}
    stacked = [load_E.float() for load_E in loads.values()]
    violation_L = torch.stack([load_E.max() / load_E.mean().clamp(min=1e-9) - 1 for load_E in stacked])
    dead = torch.stack([(load_E == 0).sum() for load_E in stacked]).sum().float()
    return {"moe/max_violation": violation_L.mean(), "moe/max_violation_worst": violation_L.max(),
            "moe/dead_experts": dead,
            **{f"moe/max_violation/{layer}": value for layer, value in zip(loads, violation_L, strict=True)}}


@dataclass
class PeakRate:
    """The FLOP/s that count as 100 % utilisation, and the source of the figure.

    For bf16 on a known GPU the maker's dense peak; otherwise the best of a few large matrix products on this
    machine with the threads that training uses, so that 100 % means "as fast as its own matrix products".
    """

    flops: float
    source: str
    measure_again: Callable[[], float] | None = None
    tries: int = 3  # times that a measured peak is measured again

    def utilisation(self, flops_per_second: float, processes: int = 1) -> float | None:
        """Return the fraction of the peak of all processes; None rather than a fraction above 1.

        A peak that was measured while the machine was busy is too low. It is measured again where a step was faster.

        Example:
            >>> PeakRate(100.0, "data sheet").utilisation(50.0), PeakRate(100.0, "data sheet").utilisation(150.0)
            (0.5, None)
        """
        while flops_per_second > self.flops * processes and self.measure_again is not None and self.tries:
            self.tries -= 1
            self.flops = max(self.flops, self.measure_again())
        fraction = flops_per_second / (self.flops * processes)
        return fraction if fraction <= 1 else None


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Return the FLOP/s that count as 100 % utilisation, and the source of the figure: data sheet or measured."""
    published = _published_peak(device, precision)
    if published is not None:
        return published
    size, dtype = _matrix_product(device, precision)
    return _measured_once(size, dtype, device, torch.get_num_threads()), f"measured {size}^3 matrix product"


def peak_measurement(device: torch.device, precision: str) -> Callable[[], float] | None:
    """Return what measures the peak of a device again; None where the peak is that of a data sheet."""
    if _published_peak(device, precision) is not None:
        return None
    return functools.partial(_matrix_product_flops, *_matrix_product(device, precision), device)


def _published_peak(device: torch.device, precision: str) -> tuple[float, str] | None:
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for known in sorted(PUBLISHED_PEAKS, key=len, reverse=True):
            if re.search(rf"\b{known}\b", name):
                return PUBLISHED_PEAKS[known], f"data sheet of the {known}"
    return None


def _matrix_product(device: torch.device, precision: str) -> tuple[int, torch.dtype]:
    """Return the width and dtype of the square matrices whose product is measured."""
    return 8192 if device.type == "cuda" else 1024, torch.bfloat16 if precision == "bf16" else torch.float32


@functools.cache
def _measured_once(size: int, dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """Measure the FLOP/s of matrix products once per process and number of `threads`."""
    return _matrix_product_flops(size, dtype, device)


def _matrix_product_flops(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOP/s of the best of a few matrix products."""
    a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bits_per_byte(nats: float, num_bytes: float) -> float | None:
    """Convert the total nats of a text to bits per byte; None where no byte counts.

    Example:
        >>> bits_per_byte(math.log(2) * 30, 10)
        3.0
    """
    return nats / num_bytes / math.log(2) if num_bytes else None


def perplexity(nats_per_token: float) -> float:
    """Compute exp(loss), infinite where that overflows."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf
