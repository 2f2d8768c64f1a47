"""Norm modules: they hold the weights; the arithmetic is in `hybridlm_kernels`. D is the normalised, last dim."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridlm.model.fp32_parameters import KeepsFP32
from hybridlm.model.layer_context import NormConfig
from hybridlm_kernels import gated_rms_norm, rms_norm


class RMSNorm(KeepsFP32):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; with `zero_centered`, times (1 + weight) (Gemma).

    Zhang & Sennrich 2019. fp32 inside, the result in the dtype of x.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, dim: int, eps: float = 1e-6, zero_centered: bool = False):
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @classmethod
    def of(cls, config: NormConfig, dim: int, eps: float | None = None) -> RMSNorm:
        """The model's norm over `dim` dims; `eps` replaces the model's."""
        return cls(dim, config.eps if eps is None else eps, config.zero_centered)

    def reset_parameters(self) -> None:
        """Start as the plain normalisation."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, zero_centered=self.zero_centered)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, zero_centered={self.zero_centered}"


class GatedRMSNorm(KeepsFP32):
    """RMSNorm(x) * activation(gate), the output norm of gated linear mixers. Never zero-centred."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, dim: int, eps: float, activation: Literal["silu", "sigmoid"]):
        super().__init__()
        self.eps = eps
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """`gate` has the shape of `x`."""
        return gated_rms_norm(x, gate, self.weight, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, activation={self.activation}"
