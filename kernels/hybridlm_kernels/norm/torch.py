"""Normalisations with PyTorch's fused RMS norm, whose backward needs only 1/rms a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.norm.reference import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    x_, w_D = wide(x), wide(weight)
    return F.rms_norm(x_, w_D.shape, w_D + 1.0 if zero_centered else w_D, eps).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str = "silu") -> Tensor:
    x_, w_D = wide(x), wide(weight)
    act = F.silu(wide(gate)) if activation == "silu" else torch.sigmoid(wide(gate))
    return (F.rms_norm(x_, w_D.shape, w_D, eps) * act).to(x.dtype)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    x_ = wide(x)
    return (x_ * (x_.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
