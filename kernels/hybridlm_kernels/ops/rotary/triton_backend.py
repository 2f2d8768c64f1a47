"""Rotary position embedding as one Triton kernel for both directions.

B rows, T tokens, H heads, D head dim, R rotated pairs. A program turns a tile of tokens and heads, so that cos and sin
are read once for many heads; x is read through its strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase

PAIRS_PER_PROGRAM = 1024


def rotary(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool = False) -> Tensor:
    """The Triton backend; arguments as in the public function, already checked."""
    return _TritonRotary.apply(x_BTHD, cos_BTR, sin_BTR, interleaved)


@triton.jit
def _rotate(x_ptr, cos_ptr, sin_ptr, y_ptr, T, H, x_batch, x_token, x_head, cos_batch, sign,
            D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, UNROTATED: tl.constexpr,
            HEADS: tl.constexpr, TOKENS: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    head = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[None, :, None]
    x_ptr += batch * x_batch + token * x_token + head * x_head
    y_ptr += ((batch * T + token) * H + head) * D
    exists = (token < T) & (head < H)

    pair = tl.arange(0, BLOCK_R)[None, None, :]
    at = batch * cos_batch + token * R + pair
    cos = tl.load(cos_ptr + at, mask=(token < T) & (pair < R), other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=(token < T) & (pair < R), other=0.0).to(tl.float32) * sign
    if INTERLEAVED:  # one load of whole rows, pulled apart in registers
        both = tl.arange(0, 2 * BLOCK_R)[None, None, :]
        inside = exists & (both < 2 * R)
        x = tl.load(x_ptr + both, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (TOKENS, HEADS, BLOCK_R, 2)))
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (TOKENS, HEADS, 2 * BLOCK_R))
        tl.store(y_ptr + both, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        inside = exists & (pair < R)
        a = tl.load(x_ptr + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + R + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + pair, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + R + pair, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=inside)
    if 2 * R < D:
        column = 2 * R + tl.arange(0, UNROTATED)[None, None, :]
        inside = exists & (column < D)
        tl.store(y_ptr + column, tl.load(x_ptr + column, mask=inside), mask=inside)


def _tile(T: int, H: int, D: int, R: int) -> dict[str, int]:
    block = triton.next_power_of_2(R)
    unrotated = triton.next_power_of_2(max(1, D - 2 * R))
    room = max(1, PAIRS_PER_PROGRAM // max(block, unrotated // 2))
    heads = min(triton.next_power_of_2(H), room)
    return {"BLOCK_R": block, "UNROTATED": unrotated, "HEADS": heads,
            "TOKENS": min(triton.next_power_of_2(max(T, 1)), room // heads)}


def _launch_rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool, sign: float) -> Tensor:
    x_BTHD = x_BTHD if x_BTHD.stride(-1) == 1 else x_BTHD.contiguous()
    cos_BTR, sin_BTR = cos_BTR.contiguous(), sin_BTR.contiguous()
    B, T, H, D = x_BTHD.shape
    R = cos_BTR.shape[-1]
    own_angles = cos_BTR.dim() == 3 and cos_BTR.shape[0] > 1
    y_BTHD = torch.empty(x_BTHD.shape, dtype=x_BTHD.dtype, device=x_BTHD.device)
    tile = _tile(T, H, D, R)
    _rotate[(triton.cdiv(T, tile["TOKENS"]), triton.cdiv(H, tile["HEADS"]), B)](
        x_ptr=x_BTHD, cos_ptr=cos_BTR, sin_ptr=sin_BTR, y_ptr=y_BTHD, T=T, H=H, x_batch=x_BTHD.stride(0),
        x_token=x_BTHD.stride(1), x_head=x_BTHD.stride(2), cos_batch=T * R if own_angles else 0, sign=sign, D=D, R=R,
        INTERLEAVED=interleaved, **tile)
    return y_BTHD


class _TritonRotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation by the opposite angle; only cos and sin are kept."""

    @staticmethod
    def forward(ctx, x_BTHD, cos_BTR, sin_BTR, interleaved):
        ctx.save_for_backward(cos_BTR, sin_BTR)
        ctx.interleaved = interleaved
        return _launch_rotate(x_BTHD, cos_BTR, sin_BTR, interleaved, 1.0)

    @staticmethod
    @plain_backward
    def backward(ctx, dy_BTHD):
        cos_BTR, sin_BTR = ctx.saved_tensors
        return _launch_rotate(dy_BTHD, cos_BTR, sin_BTR, ctx.interleaved, -1.0), None, None, None


def _compile_case(H: int, D: int, R: int, interleaved: bool) -> CompileCase:
    return CompileCase(f"H={H} D={D} R={R}{' interleaved' if interleaved else ''}", _rotate,
                    {"x_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "y_ptr": "*bf16", "T": "i32", "H": "i32",
                     "x_batch": "i32", "x_token": "i32", "x_head": "i32", "cos_batch": "i32", "sign": "fp32"},
                    {"D": D, "R": R, "INTERLEAVED": interleaved} | _tile(4096, H, D, R),
                    ("x_batch", "x_token", "x_head", "cos_batch"))


COMPILE_CASES = [_compile_case(*sizes) for sizes in ((32, 128, 64, False), (16, 256, 32, False), (2, 64, 32, False),
                                             (1, 64, 32, True), (16, 64, 32, True), (8, 128, 64, True))]
