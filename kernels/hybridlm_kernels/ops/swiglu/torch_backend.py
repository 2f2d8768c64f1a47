"""SwiGLU that keeps gate and up only; silu is computed again in the backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.precision import plain_backward


def swiglu(gate: Tensor, up: Tensor, limit: float | None = None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    return _TorchSwiGLU.apply(gate, up, limit)


def bounded(gate: Tensor, up: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """Gate clamped from above and up from both sides; unchanged without a limit."""
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


class _TorchSwiGLU(torch.autograd.Function):
    """SwiGLU with a backward of its own, which computes silu(gate) again."""

    @staticmethod
    def forward(ctx, gate, up, limit):
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        gate, up = bounded(gate, up, limit)
        return F.silu(gate).mul_(up)

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        raw_gate, raw_up = ctx.saved_tensors
        gate, up = bounded(raw_gate, raw_up, ctx.limit)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        dup = F.silu(gate).mul_(dy)
        if ctx.limit is not None:
            dgate.mul_(raw_gate <= ctx.limit)
            dup.mul_(raw_up.abs() <= ctx.limit)
        return dgate, dup, None
