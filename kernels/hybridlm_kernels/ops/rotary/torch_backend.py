"""Rotary position embedding written straight into its output. B rows, T tokens, H heads, D head dim, R pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward


def rotary(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool = False) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    return _TorchRotary.apply(x_BTHD, cos_BTR, sin_BTR, interleaved)


class _TorchRotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation by the opposite angle; only cos and sin are kept."""

    @staticmethod
    def forward(ctx, x_BTHD, cos_BTR, sin_BTR, interleaved):
        ctx.save_for_backward(cos_BTR, sin_BTR)
        ctx.interleaved = interleaved
        return _rotate(x_BTHD, cos_BTR, sin_BTR, interleaved)

    @staticmethod
    @plain_backward
    def backward(ctx, dy_BTHD):
        cos_BTR, sin_BTR = ctx.saved_tensors
        return _rotate(dy_BTHD, cos_BTR, -sin_BTR, ctx.interleaved), None, None, None


def _rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
    pairs, wide = cos_BTR.shape[-1], torch.promote_types(x_BTHD.dtype, torch.float32)
    cos_BT1R, sin_BT1R = cos_BTR.to(wide).unsqueeze(-2), sin_BTR.to(wide).unsqueeze(-2)
    x_ = x_BTHD.to(wide)
    y_BTHD = torch.empty(x_.shape, dtype=wide, device=x_.device)
    if interleaved:  # a pair is a complex number
        y_BTHD[..., 2 * pairs :] = x_[..., 2 * pairs :]
        pairs_x = x_[..., : 2 * pairs].unflatten(-1, (pairs, 2))
        if any(stride % 2 for stride in (*pairs_x.stride()[:-1], pairs_x.storage_offset())):
            pairs_x = pairs_x.contiguous()
        y_BTHR = torch.view_as_complex(pairs_x) * torch.complex(cos_BT1R, sin_BT1R)
        y_BTHD[..., : 2 * pairs] = torch.view_as_real(y_BTHR).flatten(-2)
    else:  # the cosine of the dims that pass unchanged is 1
        a_BTHR, b_BTHR = x_[..., :pairs], x_[..., pairs : 2 * pairs]
        unrotated = cos_BT1R.new_ones(*cos_BT1R.shape[:-1], x_.shape[-1] - 2 * pairs)
        torch.mul(x_, torch.cat([cos_BT1R, cos_BT1R, unrotated], -1), out=y_BTHD)
        y_BTHD[..., :pairs].addcmul_(b_BTHR, sin_BT1R, value=-1)
        y_BTHD[..., pairs : 2 * pairs].addcmul_(a_BTHR, sin_BT1R)
    return y_BTHD.to(x_BTHD.dtype)
