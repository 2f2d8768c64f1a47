"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's, fused. It is also the fallback of other kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybridlm.model.parametrization import ParameterScale
from hybridlm.optimizers.contract import (
    Groups,
    OptimizerConfig,
    Shape,
    register_optimizer,
    require_decay_rates,
    require_positive,
)


@dataclass(kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW. `betas` are the decay rates of the first and second moment, `eps` is added to the root of the second."""

    kind: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "eps")
        require_decay_rates("betas", *self.betas)

    def scaled_options(self, scale: ParameterScale) -> dict[str, float]:
        """A smaller eps where the parametrization carries depth, because gradients are smaller."""
        return {} if scale.adam_eps == 1.0 else {"eps": self.eps * scale.adam_eps}

    def state_shapes(self, shape: Sequence[int]) -> dict[str, Shape]:
        """A count of steps, and two moments of the shape of the parameter."""
        return {"step": (), "exp_avg": tuple(shape), "exp_avg_sq": tuple(shape)}


@register_optimizer("adamw", AdamWConfig)
def build_adamw(config: AdamWConfig, groups: Groups, lr: float) -> torch.optim.Optimizer:
    """Build torch.optim.AdamW over parameter groups, fused where the device has it."""
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)
