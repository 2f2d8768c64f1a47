"""SwiGLU as its equation reads, in fp32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.swiglu.soft_caps import SoftCaps


def swiglu(gate: Tensor, up: Tensor, limit: float | None = None,
           soft_caps: SoftCaps | None = None) -> Tensor:
    """y = gate * sigmoid(gate) * up, both bounded first by a limit, or capped by tanh outside of the sigmoid."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.to(wide), up.to(wide)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    if soft_caps is not None:
        a, b = soft_caps.gate, soft_caps.up
        u = u if b is None else b * torch.tanh(u / b)
        return (a * torch.tanh(g / a) * torch.sigmoid(g) * u).to(gate.dtype)
    return (g * torch.sigmoid(g) * u).to(gate.dtype)
