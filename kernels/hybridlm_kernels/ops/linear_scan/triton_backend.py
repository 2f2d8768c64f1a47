"""Linear scan as Triton kernels: one launch forward, one backward; reals only.

A program takes some channels of one document and goes over its tokens by tiles. In a tile the pairs (factor, state) are
combined by an associative scan along time; the state before the tile is multiplied in. The backward pass goes from the
end: the gradient of a state is that of its output, plus the next factor times the gradient of the next state.

Legend: B rows, T tokens per row, C channels, N documents, BT tokens and BC channels per tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.triton_scan import combine, document_tiles
from hybridlm_kernels.triton_support import CompileCase

TILE_TOKENS = 64
TILE_CHANNELS = 32


@triton.jit
def _load(ptr, first, position, length, channels, C):
    """The values [BT, BC] of some tokens of a document in fp32, 0 outside it."""
    inside = ((position >= 0) & (position < length))[:, None] & (channels < C)[None, :]
    return tl.load(ptr + (first + position)[:, None] * C + channels[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(x_ptr, a_ptr, state_ptr, documents_ptr, h_ptr, last_ptr, C, BT: tl.constexpr, BC: tl.constexpr):
    """Write h [tokens, C] and the last states [N, C]."""
    document = tl.program_id(0).to(tl.int64)
    first, length = tl.load(documents_ptr + document * 3), tl.load(documents_ptr + document * 3 + 1)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    real = channels < C
    state = tl.zeros([BC], tl.float32)
    if state_ptr is not None:
        state += tl.load(state_ptr + document * C + channels, mask=real, other=0.0).to(tl.float32)
    row = tl.arange(0, BT)
    for start in range(0, length, BT):
        position = start + row
        x = _load(x_ptr, first, position, length, channels, C)
        # Tokens after the end of the document leave the state as it is.
        a = tl.where((position < length)[:, None], _load(a_ptr, first, position, length, channels, C), 1.0)
        product, h = tl.associative_scan((a, x), 0, combine)
        h += product * state[None, :]
        tl.store(h_ptr + (first + position)[:, None] * C + channels[None, :], h,
                 mask=(position < length)[:, None] & real[None, :])
        state = tl.sum(tl.where((row == BT - 1)[:, None], h, 0.0), axis=0)
    tl.store(last_ptr + document * C + channels, state, mask=real)


@triton.jit
def backward_kernel(a_ptr, h_ptr, state_ptr, dh_ptr, d_last_ptr, documents_ptr, dx_ptr, da_ptr, d_state_ptr, C,
                    BT: tl.constexpr, BC: tl.constexpr):
    """Write dx and da [tokens, C], and d_state [N, C]."""
    document = tl.program_id(0).to(tl.int64)
    first, length = tl.load(documents_ptr + document * 3), tl.load(documents_ptr + document * 3 + 1)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    real = channels < C
    # The gradient of the state after the tile, by what follows it.
    carry = tl.load(d_last_ptr + document * C + channels, mask=real, other=0.0)
    row = tl.arange(0, BT)
    tiles = tl.cdiv(length, BT)
    for tile in range(tiles):
        position = (tiles - 1 - tile) * BT + row
        inside = (position < length)[:, None]
        dh = _load(dh_ptr, first, position, length, channels, C)
        # The factor that leads to the next token; 1 at the last one, whose next gradient is `carry` in this pass.
        a_next = tl.where((position + 1 < length)[:, None], _load(a_ptr, first, position + 1, length, channels, C), 1.0)
        product, dx = tl.associative_scan((a_next, dh), 0, combine, reverse=True)
        dx += product * carry[None, :]
        before = _load(h_ptr, first, position - 1, length, channels, C)
        if state_ptr is not None:
            start = tl.load(state_ptr + document * C + channels, mask=real, other=0.0).to(tl.float32)
            before += tl.where((position == 0)[:, None], start[None, :], 0.0)
        at = (first + position)[:, None] * C + channels[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside & real[None, :])
        if da_ptr is not None:
            tl.store(da_ptr + at, (dx * before).to(da_ptr.dtype.element_ty), mask=inside & real[None, :])
        carry = tl.sum(tl.where((row == 0)[:, None], dx, 0.0), axis=0)
    if d_state_ptr is not None:
        if length > 0:  # else the last state is the initial one
            carry *= tl.load(a_ptr + first * C + channels, mask=real, other=1.0).to(tl.float32)
        tl.store(d_state_ptr + document * C + channels, carry.to(d_state_ptr.dtype.element_ty), mask=real)


def linear_scan(x_BTC: Tensor, a_BTC: Tensor, state_NC: Tensor | None, borders: CuSeqlens | None,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The Triton backend; arguments as in the public function, already checked, computed in float32."""
    tensors = (None if t is None else t.contiguous() for t in (x_BTC, a_BTC, state_NC))
    return _TritonLinearScan.apply(*tensors, borders)


class _TritonLinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, state: Tensor | None, borders: CuSeqlens | None) -> Any:
        B, T, C = x.shape
        documents, _ = document_tiles(B, T, borders, x.device, TILE_TOKENS)
        h = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        last = torch.empty(len(documents), C, dtype=torch.float32, device=x.device)
        forward_kernel[(len(documents), triton.cdiv(C, TILE_CHANNELS))](
            x_ptr=x, a_ptr=a, state_ptr=state, documents_ptr=documents, h_ptr=h, last_ptr=last, C=C, BT=TILE_TOKENS,
            BC=TILE_CHANNELS)
        ctx.save_for_backward(a, h, state)
        ctx.borders, ctx.x_dtype = borders, x.dtype
        return h, last

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dh: Tensor, d_last: Tensor) -> Any:
        a, h, state = ctx.saved_tensors
        B, T, C = a.shape
        documents, _ = document_tiles(B, T, ctx.borders, a.device, TILE_TOKENS)
        dx = torch.empty(a.shape, dtype=ctx.x_dtype, device=a.device)
        da = torch.empty_like(a) if ctx.needs_input_grad[1] else None
        d_state = None if state is None else torch.empty_like(state)
        backward_kernel[(len(documents), triton.cdiv(C, TILE_CHANNELS))](
            a_ptr=a, h_ptr=h, state_ptr=state, dh_ptr=dh.contiguous(), d_last_ptr=d_last.contiguous(),
            documents_ptr=documents, dx_ptr=dx, da_ptr=da, d_state_ptr=d_state, C=C, BT=TILE_TOKENS, BC=TILE_CHANNELS)
        return dx, da, d_state, None


_FORWARD_TYPES = {"x_ptr": "*bf16", "a_ptr": "*fp32", "state_ptr": "*fp32", "documents_ptr": "*i64", "h_ptr": "*fp32",
                  "last_ptr": "*fp32", "C": "i32"}
_BACKWARD_TYPES = {"a_ptr": "*fp32", "h_ptr": "*fp32", "state_ptr": "*fp32", "dh_ptr": "*fp32", "d_last_ptr": "*fp32",
                   "documents_ptr": "*i64", "dx_ptr": "*bf16", "da_ptr": "*fp32", "d_state_ptr": "*fp32", "C": "i32"}


def _compile_cases() -> Iterator[CompileCase]:
    constants = {"BT": TILE_TOKENS, "BC": TILE_CHANNELS}
    yield CompileCase("forward", forward_kernel, _FORWARD_TYPES, constants, ("C",))
    yield CompileCase("backward", backward_kernel, _BACKWARD_TYPES, constants, ("C",))


COMPILE_CASES = list(_compile_cases())
