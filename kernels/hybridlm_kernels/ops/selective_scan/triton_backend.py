"""Selective scan as Triton kernels: one launch forward, one backward.

A program takes BD channels of one document with all their states and goes over its tokens by tiles of BT. In a tile the
pairs (factor, state) are combined by an associative scan along time; the states before the tile are multiplied in. The
forward keeps the states before each tile. The backward goes from the end: it finds the states before each token again,
by a scan of the tokens moved by one, and scans the gradients from the end. Gradients of B and C are sums over channels:
each program writes its own, and torch adds them up. No atomics, the same bits every time.

Legend: R rows, T tokens per row, D channels, N states per channel (NP: to the next power of 2), M documents, P tiles of
all documents, X blocks of channels.
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

TILE_TOKENS = 16
# Channels times states of one program; beyond 32 states, sums along the states need registers.
TILE_ELEMENTS = 256
MANY_STATES_ELEMENTS = 128
MANY_STATES_BACKWARD_ELEMENTS = 64
NUM_WARPS = 8


@triton.jit
def _per_channel(ptr, first, position, length, channels, D):
    """Values [BT, BD, 1] of some tokens and channels of a document in fp32, 0 outside it."""
    inside = ((position >= 0) & (position < length))[:, None] & (channels < D)[None, :]
    x = tl.load(ptr + (first + position)[:, None] * D + channels[None, :], mask=inside, other=0.0)
    return x.to(tl.float32)[:, :, None]


@triton.jit
def _per_state(ptr, first, position, length, states, N):
    """Values [BT, 1, NP] of some tokens of a document in fp32, 0 outside it."""
    inside = ((position >= 0) & (position < length))[:, None] & (states < N)[None, :]
    x = tl.load(ptr + (first + position)[:, None] * N + states[None, :], mask=inside, other=0.0)
    return x.to(tl.float32)[:, None, :]


@triton.jit
def _decay_rates(A_ptr, channels, states, D, N):
    """A [1, BD, NP]."""
    real = (channels < D)[:, None] & (states < N)[None, :]
    at = A_ptr + channels.to(tl.int64)[:, None] * N + states[None, :]
    return tl.load(at, mask=real, other=0.0).to(tl.float32)[None, :, :]


@triton.jit
def _factor(dt, B, A, LONGHORN: tl.constexpr):
    """The factors [BT, BD, NP]; 1 where dt is 0, as it is outside a document."""
    if LONGHORN:
        return 1.0 - dt * B * B
    else:
        return tl.exp(dt * A)


@triton.jit
def forward_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, state_ptr, documents_ptr, y_ptr, kept_ptr, last_ptr, D, N,
                   BT: tl.constexpr, BD: tl.constexpr, NP: tl.constexpr, LONGHORN: tl.constexpr):
    """Write y [tokens, D], the states before each tile [P, D, N] and the last states [M, D, N]."""
    document = tl.program_id(0).to(tl.int64)
    row = documents_ptr + document * 3
    first, length, tile = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    states, row = tl.arange(0, NP), tl.arange(0, BT)
    real = (channels < D)[:, None] & (states < N)[None, :]
    at = channels.to(tl.int64)[:, None] * N + states[None, :]
    h = tl.zeros([BD, NP], tl.float32)
    if state_ptr is not None:
        h += tl.load(state_ptr + document * D * N + at, mask=real, other=0.0).to(tl.float32)
    A = 0.0
    if not LONGHORN:
        A = _decay_rates(A_ptr, channels, states, D, N)
    for start in range(0, length, BT):
        if kept_ptr is not None:
            tl.store(kept_ptr + (tile + start // BT) * D * N + at, h, mask=real)
        position = start + row
        x = _per_channel(x_ptr, first, position, length, channels, D)
        dt = _per_channel(dt_ptr, first, position, length, channels, D)
        B = _per_state(B_ptr, first, position, length, states, N)
        product, inside = tl.associative_scan((_factor(dt, B, A, LONGHORN), dt * x * B), 0, combine)
        h_all = inside + product * h[None, :, :]
        y = tl.sum(h_all * _per_state(C_ptr, first, position, length, states, N), axis=2)
        tl.store(y_ptr + (first + position)[:, None] * D + channels[None, :], y.to(y_ptr.dtype.element_ty),
                 mask=(position < length)[:, None] & (channels < D)[None, :])
        h = tl.sum(tl.where((row == BT - 1)[:, None, None], h_all, 0.0), axis=0)
    tl.store(last_ptr + document * D * N + at, h, mask=real)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, kept_ptr, dy_ptr, d_last_ptr, documents_ptr, dx_ptr, d_dt_ptr,
                    dA_ptr, dB_ptr, dC_ptr, d_state_ptr, tokens, D, N, BT: tl.constexpr, BD: tl.constexpr,
                    NP: tl.constexpr, LONGHORN: tl.constexpr):
    """Write dx and d_dt [tokens, D], dA and d_state [M, D, N], and dB and dC [X, tokens, N] of these channels."""
    document = tl.program_id(0).to(tl.int64)
    row = documents_ptr + document * 3
    first, length, tile = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    states, row = tl.arange(0, NP), tl.arange(0, BT)
    real = (channels < D)[:, None] & (states < N)[None, :]
    at = channels.to(tl.int64)[:, None] * N + states[None, :]
    block = tl.program_id(1).to(tl.int64) * tokens
    carry = tl.load(d_last_ptr + document * D * N + at, mask=real, other=0.0)
    dA = tl.zeros([BD, NP], tl.float32)
    A = 0.0
    if not LONGHORN:
        A = _decay_rates(A_ptr, channels, states, D, N)
    tiles = tl.cdiv(length, BT)
    for step in range(tiles):
        index = tiles - 1 - step
        position = index * BT + row
        h = tl.load(kept_ptr + (tile + index) * D * N + at, mask=real, other=0.0)
        # The states before each token: a scan of the tokens before them; the first one has the kept state as it is.
        inner = tl.where(row > 0, position - 1, -1)
        dt = _per_channel(dt_ptr, first, inner, length, channels, D)
        B = _per_state(B_ptr, first, inner, length, states, N)
        x = _per_channel(x_ptr, first, inner, length, channels, D)
        product, before = tl.associative_scan((_factor(dt, B, A, LONGHORN), dt * x * B), 0, combine)
        before += product * h[None, :, :]
        # Gradients of the states, from the end of the tile.
        dt = _per_channel(dt_ptr, first, position + 1, length, channels, D)
        B = _per_state(B_ptr, first, position + 1, length, states, N)
        # The last token of a tile has the factor that leads to the next tile, to which `carry` belongs.
        dy = _per_channel(dy_ptr, first, position, length, channels, D)
        C = _per_state(C_ptr, first, position, length, states, N)
        product, dh = tl.associative_scan((_factor(dt, B, A, LONGHORN), dy * C), 0, combine, reverse=True)
        dh += product * carry[None, :, :]
        # Gradients of what the token brings.
        dt = _per_channel(dt_ptr, first, position, length, channels, D)
        B = _per_state(B_ptr, first, position, length, states, N)
        x = _per_channel(x_ptr, first, position, length, channels, D)
        factor = _factor(dt, B, A, LONGHORN)
        h_all = factor * before + dt * x * B
        inside = (position < length)[:, None]
        at_token = (first + position)[:, None]
        at_states = (block + at_token) * N + states[None, :]
        state_mask = inside & (states < N)[None, :]
        tl.store(dC_ptr + at_states, tl.sum(dy * h_all, axis=1), mask=state_mask)
        d_factor = dh * before
        by_B = tl.sum(dh * B, axis=2)
        dB = tl.sum(dh * (dt * x), axis=1)
        if LONGHORN:
            d_dt = by_B * tl.sum(x, axis=2) - tl.sum(d_factor * B * B, axis=2)
            dB -= 2.0 * tl.sum(d_factor * dt * B, axis=1)
        else:
            d_exponent = d_factor * factor
            d_dt = by_B * tl.sum(x, axis=2) + tl.sum(d_exponent * A, axis=2)
            dA += tl.sum(d_exponent * dt, axis=0)
        tl.store(dB_ptr + at_states, dB, mask=state_mask)
        channel_mask = inside & (channels < D)[None, :]
        tl.store(dx_ptr + at_token * D + channels[None, :], (by_B * tl.sum(dt, axis=2)).to(dx_ptr.dtype.element_ty),
                 mask=channel_mask)
        tl.store(d_dt_ptr + at_token * D + channels[None, :], d_dt.to(d_dt_ptr.dtype.element_ty), mask=channel_mask)
        carry = tl.sum(tl.where((row == 0)[:, None, None], dh, 0.0), axis=0)
    if not LONGHORN:
        tl.store(dA_ptr + document * D * N + at, dA, mask=real)
    if d_state_ptr is not None:
        if length > 0:  # else the last states are the initial ones
            dt = _per_channel(dt_ptr, first, row, tl.minimum(length, 1), channels, D)
            B = _per_state(B_ptr, first, row, tl.minimum(length, 1), states, N)
            factor = _factor(dt, B, A, LONGHORN)
            carry *= tl.sum(tl.where((row == 0)[:, None, None], factor, 0.0), axis=0)
        tl.store(d_state_ptr + document * D * N + at, carry.to(d_state_ptr.dtype.element_ty), mask=real)


def selective_scan(x_RTD: Tensor, dt_RTD: Tensor, A_DN: Tensor | None, B_RTN: Tensor, C_RTN: Tensor,
                   state_MDN: Tensor | None, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The Triton backend; arguments as in the public function, already checked."""
    tensors = (None if t is None else t.contiguous() for t in (x_RTD, dt_RTD, A_DN, B_RTN, C_RTN, state_MDN))
    return _TritonSelectiveScan.apply(*tensors, borders)


class _TritonSelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor, C: Tensor, state: Tensor | None,
                borders: CuSeqlens | None) -> Any:
        (R, T, D), N = x.shape, B.shape[2]
        documents, tiles = document_tiles(R, T, borders, x.device, TILE_TOKENS)
        y = torch.empty_like(x)
        kept = None
        if any(ctx.needs_input_grad):
            kept = torch.empty(tiles, D, N, dtype=torch.float32, device=x.device)
        last = torch.empty(len(documents), D, N, dtype=torch.float32, device=x.device)
        sizes = _sizes(N, backward=False)
        forward_kernel[(len(documents), triton.cdiv(D, sizes["BD"]))](
            x_ptr=x, dt_ptr=dt, A_ptr=A, B_ptr=B, C_ptr=C, state_ptr=state, documents_ptr=documents, y_ptr=y,
            kept_ptr=kept, last_ptr=last, D=D, N=N, LONGHORN=A is None, num_warps=NUM_WARPS, **sizes)
        ctx.save_for_backward(x, dt, A, B, C, state, kept)
        ctx.borders = borders
        return y, last

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dy: Tensor, d_last: Tensor) -> Any:
        x, dt, A, B, C, state, kept = ctx.saved_tensors
        (R, T, D), N = x.shape, B.shape[2]
        documents, _ = document_tiles(R, T, ctx.borders, x.device, TILE_TOKENS)
        sizes = _sizes(N, backward=True)
        blocks = triton.cdiv(D, sizes["BD"])
        dx, d_dt = torch.empty_like(x), torch.empty_like(dt)
        dA = None if A is None else torch.empty(len(documents), D, N, dtype=torch.float32, device=x.device)
        dB, dC = (torch.empty(blocks, R, T, N, dtype=torch.float32, device=x.device) for _ in range(2))
        d_state = None if state is None else torch.empty_like(state)
        backward_kernel[(len(documents), blocks)](
            x_ptr=x, dt_ptr=dt, A_ptr=A, B_ptr=B, C_ptr=C, kept_ptr=kept, dy_ptr=dy.contiguous(),
            d_last_ptr=d_last.contiguous(), documents_ptr=documents, dx_ptr=dx, d_dt_ptr=d_dt, dA_ptr=dA, dB_ptr=dB,
            dC_ptr=dC, d_state_ptr=d_state, tokens=R * T, D=D, N=N, LONGHORN=A is None, num_warps=NUM_WARPS, **sizes)
        return (dx, d_dt, None if dA is None or A is None else dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype),
                dC.sum(0).to(C.dtype), d_state, None)


def _sizes(states: int, backward: bool) -> dict[str, int]:
    padded = triton.next_power_of_2(states)
    many = MANY_STATES_BACKWARD_ELEMENTS if backward else MANY_STATES_ELEMENTS
    elements = TILE_ELEMENTS if padded <= 32 else many
    return {"BT": TILE_TOKENS, "BD": max(1, elements // padded), "NP": padded}


_INPUT_TYPES = {"x_ptr": "*bf16", "dt_ptr": "*fp32", "A_ptr": "*fp32", "B_ptr": "*bf16", "C_ptr": "*bf16",
                "documents_ptr": "*i64", "kept_ptr": "*fp32", "D": "i32", "N": "i32"}
_FORWARD_TYPES = _INPUT_TYPES | {"state_ptr": "*fp32", "y_ptr": "*bf16", "last_ptr": "*fp32"}
_BACKWARD_TYPES = _INPUT_TYPES | {"dy_ptr": "*bf16", "d_last_ptr": "*fp32", "dx_ptr": "*bf16", "d_dt_ptr": "*fp32",
                                  "dA_ptr": "*fp32", "dB_ptr": "*fp32", "dC_ptr": "*fp32", "d_state_ptr": "*fp32",
                                  "tokens": "i32"}


def _compile_cases() -> Iterator[CompileCase]:
    for N in (16, 64):
        for longhorn in (False, True):
            name = f"{'Longhorn' if longhorn else 'Mamba'} N={N}"
            absent: dict[str, None] = dict.fromkeys(["A_ptr"] if longhorn else [])
            forward = {key: kind for key, kind in _FORWARD_TYPES.items() if key not in absent}
            yield CompileCase(f"forward {name}", forward_kernel, forward,
                              {**_sizes(N, backward=False), "LONGHORN": longhorn, **absent}, ("D", "N"),
                              num_warps=NUM_WARPS)
            absent = dict.fromkeys(["A_ptr", "dA_ptr"] if longhorn else [])
            backward = {key: kind for key, kind in _BACKWARD_TYPES.items() if key not in absent}
            yield CompileCase(f"backward {name}", backward_kernel, backward,
                              {**_sizes(N, backward=True), "LONGHORN": longhorn, **absent}, ("D", "N"),
                              num_warps=NUM_WARPS)


COMPILE_CASES = list(_compile_cases())
