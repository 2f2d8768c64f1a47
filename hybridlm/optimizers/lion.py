"""Lion (Chen et al., arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum, from lion-pytorch.

Its state is one tensor per parameter; that of AdamW is two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybridlm.optimizers.contract import Groups, OptimizerConfig, Shape, register_optimizer, require_decay_rates


@dataclass(kw_only=True)
class LionConfig(OptimizerConfig):
    """Lion for all parameters. `betas` are the decay rates of the step's direction and of the momentum.

    Every element moves by `lr`: take a 3 to 10 times lower `lr` and as many times more `weight_decay` than with AdamW
    (section 5 of the paper).
    """

    kind: str = "lion"
    lr: float = 1e-4
    weight_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay_rates("betas", *self.betas)

    def state_shapes(self, shape: Sequence[int]) -> dict[str, Shape]:
        """One momentum of the shape of the parameter."""
        return {"exp_avg": tuple(shape)}


@register_optimizer("lion", LionConfig)
def build_lion(config: LionConfig, groups: Groups, lr: float) -> torch.optim.Optimizer:
    """Build lion_pytorch.Lion over parameter groups."""
    from lion_pytorch import Lion

    return Lion(groups, lr=lr, betas=config.betas)
