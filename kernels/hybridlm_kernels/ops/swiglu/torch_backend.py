"""SwiGLU that keeps gate and up only; silu is computed again in the backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.ops.swiglu.soft_caps import SoftCaps
from hybridlm_kernels.precision import plain_backward, wide


def swiglu(gate: Tensor, up: Tensor, limit: float | None = None, soft_caps: SoftCaps | None = None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    return _TorchSwiGLU.apply(gate, up, limit) if soft_caps is None else _TorchSiTU.apply(gate, up, soft_caps)


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


def soft_parts(gate: Tensor, up: Tensor, soft_caps: SoftCaps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors of SiTU, f(gate) and h(up), and their derivatives, in fp32 at least."""
    a, b = soft_caps.gate, soft_caps.up
    g, u = wide(gate), wide(up)
    sigmoid, tanh = g.sigmoid(), (g / a).tanh()
    by_gate = sigmoid * ((1 - tanh.square()) + a * tanh * (1 - sigmoid))
    if b is None:
        return a * tanh * sigmoid, u, by_gate, torch.ones_like(u)
    capped = (u / b).tanh()
    return a * tanh * sigmoid, b * capped, by_gate, 1 - capped.square()


class _TorchSiTU(torch.autograd.Function):
    """SiTU with a backward of its own, which keeps gate and up only."""

    @staticmethod
    def forward(ctx, gate, up, soft_caps):
        ctx.save_for_backward(gate, up)
        ctx.soft_caps = soft_caps
        f, h, _, _ = soft_parts(gate, up, soft_caps)
        return (f * h).to(gate.dtype)

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        f, h, by_gate, by_up = soft_parts(gate, up, ctx.soft_caps)
        return (dy * h * by_gate).to(gate.dtype), (dy * f * by_up).to(up.dtype), None
