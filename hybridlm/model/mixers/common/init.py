"""Initialisations that several mixers use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hybridlm.model.norm import GatedRMSNorm, GateFirstRMSNorm, HeadGroupNorm, HeadRMSNorm, RMSNorm

NORMS = (RMSNorm, GatedRMSNorm, GateFirstRMSNorm, HeadGroupNorm, HeadRMSNorm, nn.LayerNorm)


def init_projections(mixer: nn.Module, std: float) -> None:
    """Initialise linear weights by normal(0, std), biases by zero, and norms as the identity."""
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, NORMS):
            module.reset_parameters()


@torch.no_grad()
def init_conv(weight_CW: Tensor) -> None:
    """Initialise a depthwise convolution: uniform in +-W^-0.5, torch's default, as published models do."""
    bound = weight_CW.shape[1] ** -0.5
    weight_CW.uniform_(-bound, bound)


@torch.no_grad()
def init_identity_conv(weight_CW: Tensor) -> None:
    """Initialise a depthwise convolution as the identity: its last tap, the token itself, is 1."""
    weight_CW.zero_()
    weight_CW[:, -1] = 1.0


@torch.no_grad()
def init_log_uniform(x: Tensor, low: float, high: float) -> None:
    """Initialise by the logarithm of a uniform distribution on [low, high]; low = high sets all entries alike."""
    x.uniform_(low, high).clamp_min_(1e-4).log_()  # OLMo-Hybrid draws from 0 on


@torch.no_grad()
def init_inverse_softplus(x: Tensor, low: float, high: float, floor: float = 1e-4) -> None:
    """Initialise so that softplus(x) is log-uniform in [low, high], as the steps of Mamba (Gu and Dao 2023) are."""
    step = x.uniform_(math.log(low), math.log(high)).exp_().clamp_min_(floor)
    x.copy_(step + torch.log(-torch.expm1(-step)))
