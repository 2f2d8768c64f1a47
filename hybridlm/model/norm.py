"""Norm modules: they hold the weights; the arithmetic is in `hybridlm_kernels`. D is the normalised, last dim."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridlm.model.fp32_parameters import KeepsFP32
from hybridlm.model.layer_context import NormConfig
from hybridlm_kernels import gated_rms_norm, rms_norm
from hybridlm_kernels.precision import wide


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


class HeadRMSNorm(KeepsFP32):
    """RMSNorm over the dims of each head, with a weight of its own for every head. Never zero-centred.

    Sources: Lin et al. 2025 (Forgetting Transformer), norms of queries, keys and outputs.

    Args:
        heads: number of heads H.
        dim: dims per head K.
        eps: added to the mean of squares.

    >>> HeadRMSNorm(heads=2, dim=1, eps=0.0)(torch.tensor([[4.0], [-3.0]])).flatten().tolist()
    [1.0, -1.0]
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, heads: int, dim: int, eps: float):
        super().__init__()
        self.heads = heads
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        weight_HK = self.weight.unflatten(0, (self.heads, -1))
        normed_BTHK = rms_norm(wide(x_BTHK), torch.ones_like(weight_HK[0]), self.eps)
        return (normed_BTHK * weight_HK).to(x_BTHK.dtype)

    def extra_repr(self) -> str:
        return f"{self.heads} x {self.weight.shape[0] // self.heads}, eps={self.eps}"


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


def activate_gate(gate: Tensor, activation: str) -> Tensor:
    """The gate under its activation: silu, sigmoid, or linear, which is the gate itself.

    >>> gate = torch.tensor([0.0])
    >>> activate_gate(gate, "sigmoid"), activate_gate(gate - 2, "linear")
    (tensor([0.5000]), tensor([-2.]))
    """
    if activation == "linear":
        return gate
    return torch.nn.functional.silu(gate) if activation == "silu" else gate.sigmoid()


class WeightlessRMSNorm(nn.Module):
    """RMSNorm without a weight, times the activation of a gate where there is one (RetNet, TransNormerLLM).

    Args:
        eps: added to the mean square.
        activation: of the gate, where linear is the gate itself; None: no gate.

    Example:
        >>> WeightlessRMSNorm(eps=0.0)(torch.tensor([3.0, -3.0])).tolist()
        [1.0, -1.0]
    """

    def __init__(self, eps: float, activation: Literal["silu", "sigmoid", "linear"] | None = None):
        super().__init__()
        self.eps = eps
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = torch.nn.functional.rms_norm(wide(x), x.shape[-1:], eps=self.eps)
        if gate is not None:
            normed = normed * activate_gate(wide(gate), self.activation or "linear")
        return normed.to(x.dtype)


class GateFirstRMSNorm(KeepsFP32):
    """RMSNorm(x * silu(gate)) over groups of channels, with a weight per channel (Mamba-2, Rodimus).

    Args:
        channels: channels C of a row.
        groups: groups of consecutive channels that are normalised apart.
        eps: added to the mean square.

    Example:
        >>> norm = GateFirstRMSNorm(4, groups=2, eps=0.0)
        >>> norm(torch.tensor([[3.0, 3.0, -7.0, -7.0]]), torch.ones(1, 4)).tolist()
        [[1.0, 1.0, -1.0, -1.0]]
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def reset_parameters(self) -> None:
        """Start as the plain normalisation."""
        nn.init.ones_(self.weight)

    def forward(self, x_BTC: Tensor, gate_BTC: Tensor) -> Tensor:
        gated = (wide(x_BTC) * torch.nn.functional.silu(wide(gate_BTC))).unflatten(-1, (self.groups, -1))
        normed = torch.nn.functional.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight).to(x_BTC.dtype)


class HeadGroupNorm(KeepsFP32):
    """LayerNorm over each head of a row of channels, with a weight and a bias per channel (RWKV-5 to 7, xLSTM).

    Args:
        heads: heads that the channels are divided into.
        channels: channels C of all heads.
        eps: added to the variance.
        bias: whether there is a bias.

    Example:
        >>> HeadGroupNorm(2, 4, eps=0.0)(torch.tensor([[1.0, 3.0, 10.0, 30.0]])).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(self, heads: int, channels: int, eps: float, bias: bool = True):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def reset_parameters(self) -> None:
        """Start as the plain normalisation."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        wide = x_BTC.to(torch.promote_types(x_BTC.dtype, torch.float32)).unflatten(-1, (self.heads, -1))
        normed = torch.nn.functional.layer_norm(wide, wide.shape[-1:], eps=self.eps).flatten(-2)
        scaled = normed * self.weight
        return (scaled if self.bias is None else scaled + self.bias).to(x_BTC.dtype)
