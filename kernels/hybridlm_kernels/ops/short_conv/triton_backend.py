"""Short causal convolution as Triton kernels: one launch forward, also for decoding, and one backward.

A program takes some positions of a document and some channels. Positions count from the start of the document; those
below 0 are the state, so a document of L tokens has L + W - 1 of them and no tap needs a special case. The backward
pass computes the values before the activation again. Gradients of the weights are summed by block, then over blocks:
no atomics, and the same bits every time.

Legend: B rows, T tokens, C channels, W taps, N documents, R positions and BC channels per program, P blocks of
positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase, copy_table, keep_for_graphs

BLOCK_POSITIONS = 32  # positions per program


@triton.jit
def _input_at(x_ptr, state_ptr, document, first, length, position, channels, C, W: tl.constexpr):
    """Load the inputs [R, BC] at some positions in fp32, 0 where there are none."""
    real = (channels < C)[None, :]
    at = (first + position)[:, None] * C + channels[None, :]
    x = tl.load(x_ptr + at, mask=((position >= 0) & (position < length))[:, None] & real, other=0.0).to(tl.float32)
    if state_ptr is not None:
        at = (document * C + channels)[None, :] * (W - 1) + (position + W - 1)[:, None]
        x += tl.load(state_ptr + at, mask=((position < 0) & (position >= 1 - W))[:, None] & real, other=0.0)
    return x


@triton.jit
def _before_activation(x_ptr, state_ptr, weight_ptr, bias_ptr, document, first, length, position, channels, C,
                       W: tl.constexpr):
    """The values [R, BC] before the activation at some positions."""
    z = tl.zeros([position.shape[0], channels.shape[0]], tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        weight = tl.load(weight_ptr + channels * W + w, mask=channels < C, other=0.0).to(tl.float32)
        z += weight[None, :] * _input_at(x_ptr, state_ptr, document, first, length, position - (W - 1 - w), channels, C,
                                         W)
    return z


@triton.jit
def forward_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, blocks_ptr, y_ptr, last_ptr, C, W: tl.constexpr,
                   R: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr, KEPT: tl.constexpr):
    """Write y [tokens, C] and, in the block that holds a document's last token, the last inputs [N, C, W-1]."""
    row = blocks_ptr + tl.program_id(0).to(tl.int64) * 4
    document, first, length, start = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    position, channels = start + tl.arange(0, R), tl.program_id(1) * BC + tl.arange(0, BC)
    y = _before_activation(x_ptr, state_ptr, weight_ptr, bias_ptr, document, first, length, position, channels, C, W)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    inside = ((position >= 0) & (position < length))[:, None] & (channels < C)[None, :]
    tl.store(y_ptr + (first + position)[:, None] * C + channels[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    if KEPT > 0 and start + R >= length:
        s = tl.arange(0, KEPT)
        kept = _input_at(x_ptr, state_ptr, document, first, length, length - (W - 1) + s, channels, C, W)
        at = (document * C + channels)[None, :] * (W - 1) + s[:, None]
        tl.store(last_ptr + at, kept.to(last_ptr.dtype.element_ty), mask=(s < W - 1)[:, None] & (channels < C)[None, :])


@triton.jit
def _dz_at(x_ptr, state_ptr, weight_ptr, bias_ptr, dy_ptr, document, first, length, position, channels, C,
           W: tl.constexpr, SILU: tl.constexpr):
    """The gradient [R, BC] of the values before the activation at some positions."""
    inside = ((position >= 0) & (position < length))[:, None] & (channels < C)[None, :]
    at = (first + position)[:, None] * C + channels[None, :]
    dz = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = _before_activation(x_ptr, state_ptr, weight_ptr, bias_ptr, document, first, length, position, channels, C,
                               W)
        s = 1.0 / (1.0 + tl.exp(-z))
        dz *= s * (1.0 + z * (1.0 - s))
    return dz


@triton.jit
def backward_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, dy_ptr, d_last_ptr, blocks_ptr, dx_ptr, d_state_ptr,
                    d_weight_ptr, d_bias_ptr, C, W: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
                    SILU: tl.constexpr):
    """Write dx [tokens, C], d_state [N, C, W-1], and per block d_weight [P, W, C] and d_bias [P, C]."""
    block = tl.program_id(0).to(tl.int64)
    row = blocks_ptr + block * 4
    document, first, length, start = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    position, channels = start + tl.arange(0, R), tl.program_id(1) * BC + tl.arange(0, BC)
    real = channels < C
    dz = _dz_at(x_ptr, state_ptr, weight_ptr, bias_ptr, dy_ptr, document, first, length, position, channels, C, W, SILU)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + block * C + channels, tl.sum(dz, axis=0), mask=real)
    for w in tl.static_range(W):
        x = _input_at(x_ptr, state_ptr, document, first, length, position - (W - 1 - w), channels, C, W)
        tl.store(d_weight_ptr + (block * W + w) * C + channels, tl.sum(dz * x, axis=0), mask=real)
    dx = dz * tl.load(weight_ptr + channels * W + W - 1, mask=real, other=0.0).to(tl.float32)[None, :]
    for ahead in tl.static_range(1, W):
        weight = tl.load(weight_ptr + channels * W + W - 1 - ahead, mask=real, other=0.0).to(tl.float32)
        dx += weight[None, :] * _dz_at(x_ptr, state_ptr, weight_ptr, bias_ptr, dy_ptr, document, first, length,
                                       position + ahead, channels, C, W, SILU)
    kept = position - (length - (W - 1))  # index among the last inputs
    at = (document * C + channels)[None, :] * (W - 1) + kept[:, None]
    dx += tl.load(d_last_ptr + at, mask=((kept >= 0) & (kept < W - 1))[:, None] & real[None, :], other=0.0)
    inside = ((position >= 0) & (position < length))[:, None] & real[None, :]
    tl.store(dx_ptr + (first + position)[:, None] * C + channels[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if d_state_ptr is not None:
        at = (document * C + channels)[None, :] * (W - 1) + (position + W - 1)[:, None]
        tl.store(d_state_ptr + at, dx.to(d_state_ptr.dtype.element_ty), mask=(position < 0)[:, None] & real[None, :])


def short_conv(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None,
               state_NCW: Tensor | None, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The Triton backend; arguments as in the public function, already checked. `state_NCW` holds W - 1 inputs."""
    tensors = (None if t is None else t.contiguous() for t in (x_BTC, weight_CW, bias_C, state_NCW))
    return _TritonShortConv.apply(*tensors, activation == "silu", borders)


class _TritonShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool,
                borders: CuSeqlens | None) -> Any:
        (B, T, C), W = x.shape, weight.shape[1]
        blocks = _blocks(B, T, W, borders, x.device)
        y = torch.empty_like(x)
        last = x.new_empty(B if borders is None else borders.num_documents, C, W - 1)
        channels = _channels(C)
        forward_kernel[(len(blocks), triton.cdiv(C, channels))](
            x_ptr=x, weight_ptr=weight, bias_ptr=bias, state_ptr=state, blocks_ptr=blocks, y_ptr=y, last_ptr=last, C=C,
            W=W, R=BLOCK_POSITIONS, BC=channels, SILU=silu, KEPT=triton.next_power_of_2(W - 1) if W > 1 else 0)
        ctx.save_for_backward(x, weight, bias, state)
        ctx.silu, ctx.borders = silu, borders
        return y, last

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dy: Tensor, d_last: Tensor) -> Any:
        x, weight, bias, state = ctx.saved_tensors
        (B, T, C), W = x.shape, weight.shape[1]
        blocks = _blocks(B, T, W, ctx.borders, x.device)
        dx, d_state = torch.empty_like(x), None if state is None else torch.empty_like(state)
        d_weight = torch.empty(len(blocks), W, C, dtype=torch.float32, device=x.device)
        d_bias = None if bias is None else torch.empty(len(blocks), C, dtype=torch.float32, device=x.device)
        channels = _channels(C)
        backward_kernel[(len(blocks), triton.cdiv(C, channels))](
            x_ptr=x, weight_ptr=weight, bias_ptr=bias, state_ptr=state, dy_ptr=dy.contiguous(),
            d_last_ptr=d_last.contiguous(), blocks_ptr=blocks, dx_ptr=dx, d_state_ptr=d_state, d_weight_ptr=d_weight,
            d_bias_ptr=d_bias, C=C, W=W, R=BLOCK_POSITIONS, BC=channels, SILU=ctx.silu)
        return (dx, d_weight.sum(0).t().to(weight.dtype),
                None if d_bias is None or bias is None else d_bias.sum(0).to(bias.dtype), d_state, None, None)


def _channels(C: int) -> int:
    return min(32, max(16, triton.next_power_of_2(C)))


def _blocks(batch: int, length: int, taps: int, borders: CuSeqlens | None, device: torch.device) -> Tensor:
    """Document, its first token, its length and the first position of every block, int64 [P, 4].

    Tables of packed batches are kept with their borders, plain ones by their size.
    """
    if borders is None:
        return keep_for_graphs(_plain_blocks(batch, length, taps, device))
    key = ("short_conv_blocks", taps, device)
    if key not in borders.cache:
        borders.cache[key] = _table(borders.host[:-1], borders.lengths, taps, device, shared=False)
    return keep_for_graphs(borders.cache[key])


@lru_cache(maxsize=4096)
def _plain_blocks(batch: int, length: int, taps: int, device: torch.device) -> Tensor:
    return _table(range(0, batch * length, length), [length] * batch, taps, device, shared=True)


def _table(firsts: Any, lengths: list[int], taps: int, device: torch.device, shared: bool) -> Tensor:
    counts = -(-(np.asarray(lengths) + taps - 1) // BLOCK_POSITIONS)
    document = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(document)) - (np.cumsum(counts) - counts)[document]
    table = np.stack([document, np.asarray(firsts)[document], np.asarray(lengths)[document],
                      within * BLOCK_POSITIONS - (taps - 1)], axis=1)
    return copy_table(table, device, shared)


_TYPES = {"x_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "state_ptr": "*bf16", "blocks_ptr": "*i64",
          "C": "i32"}
_FORWARD_TYPES = _TYPES | {"y_ptr": "*bf16", "last_ptr": "*bf16"}
_BACKWARD_TYPES = _TYPES | {"dy_ptr": "*bf16", "d_last_ptr": "*bf16", "dx_ptr": "*bf16", "d_state_ptr": "*bf16",
                            "d_weight_ptr": "*fp32", "d_bias_ptr": "*fp32"}


def _compile_cases() -> Iterator[CompileCase]:
    for W in (3, 4):
        constants = {"W": W, "R": BLOCK_POSITIONS, "BC": 32, "SILU": True}
        yield CompileCase(f"forward W={W}", forward_kernel, _FORWARD_TYPES,
                          constants | {"KEPT": triton.next_power_of_2(W - 1)}, ("C",))
        yield CompileCase(f"backward W={W}", backward_kernel, _BACKWARD_TYPES, constants, ("C",))


COMPILE_CASES = list(_compile_cases())
