"""Rotary position embedding, pair by pair. B rows, T tokens, H heads, D head dim, R rotated pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool = False) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair among the first 2R dims."""
    pairs = cos_BTR.shape[-1]
    wide = torch.promote_types(x_BTHD.dtype, torch.float32)
    cos_BT1R, sin_BT1R = cos_BTR.to(wide).unsqueeze(-2), sin_BTR.to(wide).unsqueeze(-2)
    rotated, passed = x_BTHD.to(wide).split([2 * pairs, x_BTHD.shape[-1] - 2 * pairs], -1)
    a_BTHR, b_BTHR = rotated.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    turned = a_BTHR * cos_BT1R - b_BTHR * sin_BT1R, b_BTHR * cos_BT1R + a_BTHR * sin_BT1R
    rotated = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([rotated, passed], -1).to(x_BTHD.dtype)
