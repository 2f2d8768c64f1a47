"""Normalisations as their equations read, in fp32 or better. Shapes: last dim D, any leading dims."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.precision import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * w, with w = 1 + weight when zero-centred."""
    x_ = wide(x)
    w_D = wide(weight) + (1.0 if zero_centered else 0.0)
    return (x_ * (x_.square().mean(-1, keepdim=True) + eps).rsqrt() * w_D).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str = "silu") -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight * act(gate)."""
    x_, gate_ = wide(x), wide(gate)
    act = torch.sigmoid(gate_) * (gate_ if activation == "silu" else 1.0)
    return (x_ * (x_.square().mean(-1, keepdim=True) + eps).rsqrt() * wide(weight) * act).to(x.dtype)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(sum(x^2) + eps)."""
    x_ = wide(x)
    return (x_ * (x_.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
