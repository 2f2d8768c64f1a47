"""Rotary position embedding, pair by pair. B rows, T tokens, H heads, D head dim, R rotated pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool = False) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair among the first 2R dims."""
    pairs = cos_BTR.shape[-1]
    wide = torch.promote_types(x_BTHD.dtype, torch.float32)
    first = torch.arange(pairs) * 2 if interleaved else torch.arange(pairs)
    second = first + 1 if interleaved else first + pairs
    y_BTHD = x_BTHD.to(wide).clone()
    cos_BT1R, sin_BT1R = cos_BTR.to(wide).unsqueeze(-2), sin_BTR.to(wide).unsqueeze(-2)
    a_BTHR, b_BTHR = x_BTHD[..., first].to(wide), x_BTHD[..., second].to(wide)
    y_BTHD[..., first] = a_BTHR * cos_BT1R - b_BTHR * sin_BT1R
    y_BTHD[..., second] = b_BTHR * cos_BT1R + a_BTHR * sin_BT1R
    return y_BTHD.to(x_BTHD.dtype)
