"""Muon for hidden matrices (Jordan et al., 2024; Moonlight, arXiv 2502.16982), AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridlm.model.parameter_roles import ParameterRole
from hybridlm.model.parametrization import ParameterScale
from hybridlm.optimizers.adamw import AdamWConfig
from hybridlm.optimizers.contract import (
    Groups,
    MatrixOptimizer,
    OptimizerConfig,
    Shape,
    register_optimizer,
    require_decay_rates,
    require_positive,
)


@dataclass(kw_only=True)
class MuonConfig(AdamWConfig):
    """Muon for hidden matrices. `betas` and `eps` are those of AdamW, which updates embeddings, head and vectors.

    `muon_lr`: peak learning rate of the matrices; null: `lr` (updates are scaled to the RMS of AdamW's).
    """

    kind: str = "muon"
    muon_lr: float | None = None
    muon_momentum: float = 0.95
    whole_matrices: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "muon_lr")
        require_decay_rates("muon_momentum", self.muon_momentum)

    def updates_role(self, role: ParameterRole, kept_fp32: bool) -> bool:
        """Whether the parameter is a hidden matrix or stack, and not kept in fp32: a step is computed in bf16."""
        return role.kind in ("matrix", "head_matrix", "expert_stack") and not kept_fp32

    def lr_factor(self, scale: ParameterScale) -> float:
        """Bring the step's spectral norm, 0.2 sqrt(longer side), back to sqrt(rows / columns) (arXiv 2310.17813).

        >>> MuonConfig().lr_factor(ParameterScale((64, 64), (16, 16)))  # of a square matrix
        0.5
        """
        return math.sqrt(scale.fan_out / (scale.fan_in * scale.longer_side))

    def scaled_options(self, scale: ParameterScale) -> dict[str, float]:
        """None: the step has no eps that gradients are compared with."""
        return {}

    @property
    def peak_lr(self) -> float:
        """Peak learning rate of the hidden matrices."""
        return self.lr if self.muon_lr is None else self.muon_lr

    @property
    def fallback(self) -> OptimizerConfig:
        """AdamW for embeddings, head, vectors and routers."""
        return AdamWConfig(lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def state_shapes(self, shape: Sequence[int]) -> dict[str, Shape]:
        """One momentum of the shape of the parameter."""
        return {"momentum_buffer": tuple(shape)}


class Muon(MatrixOptimizer):
    """torch.optim.Muon's update, also for stacks of matrices [E, A, B]: each orthogonalised alone, in one batch.

    Learning rates are matched to the RMS of AdamW's updates (Moonlight, arXiv 2502.16982, section 2.2).
    """

    flat_state = ("momentum_buffer",)

    def __init__(self, groups: Groups, *, lr: float, momentum: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def combine(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Update the momentum with the gradient, and return Nesterov's combination of both."""
        momentum = group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum)

    def matrix_step(self, matrix: Tensor, weight: Tensor | None, state: dict[str, Tensor],
                    group: dict[str, Any]) -> Tensor:
        """Orthogonalise the momentum, and scale it to the RMS of AdamW's updates."""
        stack_EAB = matrix if matrix.dim() == 3 else matrix[None]
        step_EAB = orthogonalise(stack_EAB).float() * (0.2 * max(matrix.shape[-2:]) ** 0.5)
        return step_EAB.reshape(matrix.shape)


def orthogonalise(grad_EAB: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Approximate U V^T of every matrix U S V^T in a stack by Newton-Schulz iteration, in bf16 as torch does.

    The quintic a X + (b (X X^T) + c (X X^T)^2) X with Jordan's coefficients, which push small singular values
    up fastest; it ends with singular values between about 0.5 and 1.5.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = grad_EAB.shape[-2] <= grad_EAB.shape[-1]
    x_EAB = (grad_EAB if wide else grad_EAB.mT).bfloat16()
    x_EAB = x_EAB / torch.linalg.vector_norm(x_EAB, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram_EAA = x_EAB @ x_EAB.mT
        poly_EAA = torch.baddbmm(gram_EAA, gram_EAA, gram_EAA, beta=b, alpha=c)
        x_EAB = torch.baddbmm(x_EAB, poly_EAA, x_EAB, beta=a)
    return x_EAB if wide else x_EAB.mT


@register_optimizer("muon", MuonConfig)
def build_muon(config: MuonConfig, groups: Groups, lr: float) -> torch.optim.Optimizer:
    """Build Muon over parameter groups."""
    return Muon(groups, lr=lr, momentum=config.muon_momentum, weight_decay=config.weight_decay)
