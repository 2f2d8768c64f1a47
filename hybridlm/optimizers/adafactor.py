"""Adafactor (Shazeer and Stern, arXiv 1804.04235) for matrices and tables, AdamW for vectors: torch's, per matrix.

The second moment of a matrix [A, B] is kept as A row means and B column means, and there is no first moment: its state
is next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hybridlm.errors import require
from hybridlm.model.parameter_roles import ParameterRole
from hybridlm.model.parametrization import ParameterScale
from hybridlm.optimizers.adamw import AdamWConfig
from hybridlm.optimizers.contract import (
    Groups,
    OptimizerConfig,
    Shape,
    register_optimizer,
    require_decay_rates,
    require_positive,
)
from hybridlm.optimizers.per_matrix import PerMatrixOptimizer
from hybridlm.optimizers.roles import VECTOR_ROLES


@dataclass(kw_only=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor for all but vectors, which AdamW updates with `adamw_lr`, `betas` and `eps`.

    A matrix moves by `lr` (at most 1/sqrt(step)) times the root mean square of its elements (at least
    `min_weight_rms`); updates with a root mean square above `clip` are scaled down to it.
    `decay_exponent`: the second moment's decay rate at step t is 1 - t^decay_exponent.
    """

    kind: str = "adafactor"
    lr: float = 1e-2
    weight_decay: float = 0.01
    decay_exponent: float = -0.8
    min_weight_rms: float = 1e-3
    clip: float = 1.0
    adamw_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    whole_matrices: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "min_weight_rms", "adamw_lr", "eps")
        require_decay_rates("betas", *self.betas)
        require(-1 <= self.decay_exponent < 0, "decay_exponent", "must be below 0", got=self.decay_exponent,
                expected="at least -1 and below 0")
        require(1 <= self.clip < math.inf, "clip", "must be at least 1 and finite", got=self.clip)

    def updates_role(self, role: ParameterRole, kept_fp32: bool) -> bool:
        """Whether the parameter is a matrix, a stack of matrices or a table."""
        return role.kind not in VECTOR_ROLES

    def lr_factor(self, scale: ParameterScale) -> float:
        """The step is relative to the weights, whose initial size already has the factor fan_in^-1/2."""
        return scale.fan_in**-0.5

    @property
    def fallback(self) -> OptimizerConfig:
        """AdamW for vectors."""
        return AdamWConfig(lr=self.adamw_lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def state_shapes(self, shape: Sequence[int]) -> dict[str, Shape]:
        """A count of steps, and the second moment as the means of rows and of columns."""
        *stack, rows, columns = shape
        return {"step": (), "row_var": (*stack, rows, 1), "col_var": (*stack, 1, columns)}


@register_optimizer("adafactor", AdafactorConfig)
def build_adafactor(config: AdafactorConfig, groups: Groups, lr: float) -> torch.optim.Optimizer:
    """Build torch.optim.Adafactor over every matrix of parameter groups."""
    options = {"beta2_decay": config.decay_exponent, "eps": (None, config.min_weight_rms), "d": config.clip,
               "foreach": False}
    return PerMatrixOptimizer(torch.optim.Adafactor, groups, lr=lr, **options)
