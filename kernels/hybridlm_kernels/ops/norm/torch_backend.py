"""Normalisations that keep their input and one number per row. Shapes: M rows of D, flattened."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.precision import plain_backward, wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    return _RmsNorm.apply(x, weight, eps, zero_centered)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str = "silu") -> Tensor:
    return _GatedRmsNorm.apply(x, gate, weight, eps, activation)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    return _L2Norm.apply(x, eps)


def _inverse_rms(x_MD: Tensor, eps: float) -> Tensor:
    """Inverse root of the mean square of each row, 1 / sqrt(mean(x^2) + eps), [M, 1]."""
    square_M1 = torch.linalg.vector_norm(x_MD, dim=-1, keepdim=True).square_()
    return square_M1.div_(x_MD.shape[-1]).add_(eps).rsqrt_()


def _gradients(dn_MD: Tensor, x_MD: Tensor, w_D: Tensor, r_M1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients dx and dw of n = x * r * w.

    With p = dn * x: dw = sum_m r p and the row's own term of dx needs sum_d p w, so both are products of p with
    a vector; dx = r w dn - x r^3 (p . w) / D.
    """
    p_MD = dn_MD * x_MD
    dw_D = p_MD.T @ r_M1[:, 0]
    own_M1 = (p_MD @ w_D)[:, None].mul_(r_M1.pow(3)).div_(-x_MD.shape[-1])
    dx_MD = torch.mul(dn_MD, w_D, out=p_MD).mul_(r_M1).addcmul_(x_MD, own_M1)
    return dx_MD, dw_D


def _rows(x: Tensor) -> Tensor:
    return wide(x).reshape(-1, x.shape[-1])


class _RmsNorm(torch.autograd.Function):
    """The RMS norm n = x r w, with `_gradients`."""

    @staticmethod
    def forward(ctx, x, weight, eps, zero_centered):
        x_MD, w_D = _rows(x), wide(weight)
        r_M1 = _inverse_rms(x_MD, eps)
        ctx.save_for_backward(x, weight, r_M1)
        ctx.shift = 1.0 if zero_centered else 0.0
        return (x_MD * r_M1).mul_(w_D + ctx.shift if ctx.shift else w_D).to(x.dtype).view(x.shape)

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        x, weight, r_M1 = ctx.saved_tensors
        dx_MD, dw_D = _gradients(_rows(dy), _rows(x), wide(weight) + ctx.shift, r_M1)
        return dx_MD.to(x.dtype).view(x.shape), dw_D.to(weight.dtype), None, None


class _GatedRmsNorm(torch.autograd.Function):
    """The gated RMS norm y = x r w act(gate); act(gate) is computed again in the backward."""

    @staticmethod
    def forward(ctx, x, gate, weight, eps, activation):
        x_MD, gate_MD, w_D = _rows(x), _rows(gate), wide(weight)
        r_M1 = _inverse_rms(x_MD, eps)
        ctx.save_for_backward(x, gate, weight, r_M1)
        ctx.act = F.silu if activation == "silu" else torch.sigmoid
        return ctx.act(gate_MD).mul_(x_MD).mul_(r_M1).mul_(w_D).to(x.dtype).view(x.shape)

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        x, gate, weight, r_M1 = ctx.saved_tensors
        x_MD, gate_MD, w_D, dy_MD = _rows(x), _rows(gate), wide(weight), _rows(dy)
        act_MD = ctx.act(gate_MD)
        dact_MD = (x_MD * r_M1).mul_(w_D).mul_(dy_MD)
        if ctx.act is F.silu:
            dgate_MD = torch.ops.aten.silu_backward(dact_MD, gate_MD)
        else:
            dgate_MD = torch.ops.aten.sigmoid_backward(dact_MD, act_MD)
        dx_MD, dw_D = _gradients(act_MD.mul_(dy_MD), x_MD, w_D, r_M1)
        return (dx_MD.to(x.dtype).view(x.shape), dgate_MD.to(gate.dtype).view(gate.shape),
                dw_D.to(weight.dtype), None, None)


class _L2Norm(torch.autograd.Function):
    """The L2 norm y = x r with r = (sum x^2 + eps)^-1/2, hence dx = r (dy - y (y . dy))."""

    @staticmethod
    def forward(ctx, x, eps):
        x_MD = _rows(x)
        r_M1 = torch.linalg.vector_norm(x_MD, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
        ctx.save_for_backward(x, r_M1)
        return (x_MD * r_M1).to(x.dtype).view(x.shape)

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        x, r_M1 = ctx.saved_tensors
        x_MD, dy_MD = _rows(x), _rows(dy)
        own_M1 = (x_MD * dy_MD).sum(-1, keepdim=True).mul_(r_M1.pow(3)).neg_()
        return (dy_MD * r_M1).addcmul_(x_MD, own_M1).to(x.dtype).view(x.shape), None
