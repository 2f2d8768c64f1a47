"""Rotary position embedding in whole-tensor steps. B rows, T tokens, H heads, D head dim, R rotated pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool = False) -> Tensor:
    pairs = cos_BTR.shape[-1]
    wide = torch.promote_types(x_BTHD.dtype, torch.float32)
    cos_BT1R, sin_BT1R = cos_BTR.to(wide).unsqueeze(-2), sin_BTR.to(wide).unsqueeze(-2)
    turned, rest = x_BTHD[..., : 2 * pairs].to(wide), x_BTHD[..., 2 * pairs :]
    if interleaved:
        a_BTHR, b_BTHR = turned.unflatten(-1, (pairs, 2)).unbind(-1)
    else:
        a_BTHR, b_BTHR = turned.chunk(2, -1)
    y = (a_BTHR * cos_BT1R - b_BTHR * sin_BT1R, b_BTHR * cos_BT1R + a_BTHR * sin_BT1R)
    y_BTHX = torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)
    return torch.cat([y_BTHX.to(x_BTHD.dtype), rest], -1)
