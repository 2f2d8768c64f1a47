"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hybridlm.errors import ConfigError, require


@dataclass(kw_only=True)
class LRScheduleConfig:
    """Learning-rate schedule of each stage.

    Args:
        kind: shape after the warm-up, see `lr_factor`.
        warmup: steps of the linear warm-up, or below 1 a fraction of the steps of the stage.
        decay: steps of the final decay of `wsd`, or below 1 a fraction of the steps of the stage.
        min_ratio: learning rate at the end of `cosine`, `linear` and `wsd`, as a fraction of the peak.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: float = 0.02
    decay: float = 0.2
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        for key in ("warmup", "decay"):
            require(getattr(self, key) >= 0, key, "must not be negative", got=getattr(self, key),
                    expected="steps, or a share of all steps when below 1")
        require(0 <= self.min_ratio <= 1, "min_ratio", "must be a share of the peak learning rate",
                got=self.min_ratio, expected="between 0 and 1")


def phase_steps(length: float, total: int) -> int:
    """Convert the length of a phase to steps: `length` itself, or that fraction of `total` when below 1."""
    return round(length * total) if length < 1 else int(length)


def check_schedule(config: LRScheduleConfig, total: int, key: str = "optimizer.schedule") -> None:
    """Check that warm-up and decay fit into `total` steps.

    Args:
        config: the schedule.
        total: steps of the stage.
        key: where the schedule stands in the config of the run.

    Raises:
        ConfigError: they take more.
    """
    decay = phase_steps(config.decay, total) if config.kind == "wsd" else 0
    used = phase_steps(config.warmup, total) + decay
    if used > total:
        raise ConfigError(f"{key}.warmup", f"warm-up and decay take {used} steps of a stage of {total}",
                          got=config.warmup, expected="steps, or a share below 1, that fit into the stage")


def lr_factor(config: LRScheduleConfig, step: int, total: int) -> float:
    """Compute the factor by which the peak learning rate is multiplied in step `step` (0 is the first) of `total`.

    Warm-up rises linearly and reaches the peak with its last step. After it:
    cosine:   from 1 to `min_ratio` along half a cosine (Loshchilov and Hutter, 2017);
    linear:   from 1 straight to `min_ratio` (Bergsma et al., arXiv 2502.15938);
    wsd:      1, then linearly down to `min_ratio` over the last `decay` steps (MiniCPM, arXiv 2404.06395);
    constant: 1.
    After the last step the factor keeps its last value.

    Args:
        config: the schedule.
        step: index of the step in its stage.
        total: steps of the stage.

    Example:
        >>> config = LRScheduleConfig(kind="wsd", warmup=2, decay=4, min_ratio=0.0)
        >>> [lr_factor(config, step, total=10) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = phase_steps(config.warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    decay = total - warmup if config.kind in ("cosine", "linear") else phase_steps(config.decay, total)
    done = min(max((step - (total - decay)) / max(decay, 1), 0.0), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.kind == "cosine" else 1 - done
    return config.min_ratio + (1 - config.min_ratio) * shape
