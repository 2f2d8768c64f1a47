"""SwiGLU as its equation reads, in fp32 or better."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float | None = None) -> Tensor:
    """y = gate * sigmoid(gate) * up, both bounded first when a limit is given."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.to(wide), up.to(wide)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return (g * torch.sigmoid(g) * u).to(gate.dtype)
