"""Attention over sources as two Triton kernels: a program has one token, and reads its sources where they are.

N tokens, S sources, D model width (`BLOCK`: a power of two). Sources are arguments of their own; those that are not
there are None. The backward goes over the sources twice, the second time from the cache, and each of its P programs
sums the query's gradient over tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.depth_attention import MAX_TRITON_SOURCES, MAX_TRITON_WIDTH
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase, as_rows, programs


def depth_attention(query: Tensor, sources: Sequence[Tensor], eps: float) -> Tensor:
    """The Triton backend; arguments as in the public function, already checked."""
    return _DepthAttention.apply(query, eps, *sources)


@triton.jit
def _row(pointer, token, stride, columns, inside):
    """One token's row of a tensor, in fp32."""
    return tl.load(pointer + token * stride + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _attend(v, q, eps, most, total, mixed, score_ptr, inverse_ptr, at, D: tl.constexpr):
    """Adds a source to a softmax: the largest score so far, the sum of exponentials, and the weighted sum."""
    inverse = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
    score = tl.sum(v * q, 0) * inverse
    tl.store(score_ptr + at, score)
    tl.store(inverse_ptr + at, inverse)
    higher = tl.maximum(most, score)
    shrink, weight = tl.exp(most - higher), tl.exp(score - higher)
    return higher, total * shrink + weight, mixed * shrink + weight * v


@triton.jit
def _forward(q_ptr, v0_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr, score_ptr, inverse_ptr, x_ptr,
             row0, row1, row2, row3, row4, row5, row6, row7, eps, S: tl.constexpr, D: tl.constexpr,
             BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    q = tl.load(q_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    mixed = tl.zeros([BLOCK], tl.float32)
    most = tl.sum(mixed, 0) - float("inf")
    total = tl.sum(mixed, 0)
    at = token * S
    most, total, mixed = _attend(_row(v0_ptr, token, row0, columns, inside), q, eps, most, total, mixed, score_ptr,
                                 inverse_ptr, at, D)
    if S > 1:
        most, total, mixed = _attend(_row(v1_ptr, token, row1, columns, inside), q, eps, most, total, mixed,
                                     score_ptr, inverse_ptr, at + 1, D)
    if S > 2:
        most, total, mixed = _attend(_row(v2_ptr, token, row2, columns, inside), q, eps, most, total, mixed,
                                     score_ptr, inverse_ptr, at + 2, D)
    if S > 3:
        most, total, mixed = _attend(_row(v3_ptr, token, row3, columns, inside), q, eps, most, total, mixed,
                                     score_ptr, inverse_ptr, at + 3, D)
    if S > 4:
        most, total, mixed = _attend(_row(v4_ptr, token, row4, columns, inside), q, eps, most, total, mixed,
                                     score_ptr, inverse_ptr, at + 4, D)
    if S > 5:
        most, total, mixed = _attend(_row(v5_ptr, token, row5, columns, inside), q, eps, most, total, mixed,
                                     score_ptr, inverse_ptr, at + 5, D)
    if S > 6:
        most, total, mixed = _attend(_row(v6_ptr, token, row6, columns, inside), q, eps, most, total, mixed,
                                     score_ptr, inverse_ptr, at + 6, D)
    if S > 7:
        most, total, mixed = _attend(_row(v7_ptr, token, row7, columns, inside), q, eps, most, total, mixed,
                                     score_ptr, inverse_ptr, at + 7, D)
    tl.store(x_ptr + token * D + columns, (mixed / total).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _set(numbers, places, place: tl.constexpr, dx, v):
    """`numbers` with dx . v at a place."""
    return tl.where(places == place, tl.sum(dx * v, 0), numbers)


@triton.jit
def _source_back(dv_ptr, v, token, columns, inside, dx, q_ptr, dq, weights, towards, away, places, place: tl.constexpr,
                 D: tl.constexpr):
    """Writes the gradient of a source; returns the query's gradient with its part."""
    weight = tl.sum(tl.where(places == place, weights, 0.0), 0)
    to_query = tl.sum(tl.where(places == place, towards, 0.0), 0)
    to_source = tl.sum(tl.where(places == place, away, 0.0), 0)
    q = tl.load(q_ptr + columns, mask=inside, other=0.0).to(tl.float32)  # again: registers are few
    dv = weight * dx + to_query * q + to_source * v
    tl.store(dv_ptr + token * D + columns, dv.to(dv_ptr.dtype.element_ty), mask=inside)
    return dq + to_query * v


@triton.jit(do_not_specialize=["steps"])
def _backward(q_ptr, v0_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr, score_ptr, inverse_ptr, dx_ptr,
              dv0_ptr, dv1_ptr, dv2_ptr, dv3_ptr, dv4_ptr, dv5_ptr, dv6_ptr, dv7_ptr, dq_ptr, N, steps,
              row0, row1, row2, row3, row4, row5, row6, row7, dx_row, S: tl.constexpr, D: tl.constexpr,
              S_TILE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    token_step = tl.num_programs(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    places = tl.arange(0, S_TILE)
    dq = tl.zeros([BLOCK], tl.float32)
    for _ in range(steps):
        if token < N:
            dx = _row(dx_ptr, token, dx_row, columns, inside)
            there = places < S
            score = tl.load(score_ptr + token * S + places, mask=there, other=-float("inf"))
            inverse = tl.load(inverse_ptr + token * S + places, mask=there, other=0.0)
            weights = tl.exp(score - tl.max(score, 0))
            weights = weights / tl.sum(weights, 0)
            dweights = tl.zeros([S_TILE], tl.float32)
            dweights = _set(dweights, places, 0, dx, _row(v0_ptr, token, row0, columns, inside))
            if S > 1:
                dweights = _set(dweights, places, 1, dx, _row(v1_ptr, token, row1, columns, inside))
            if S > 2:
                dweights = _set(dweights, places, 2, dx, _row(v2_ptr, token, row2, columns, inside))
            if S > 3:
                dweights = _set(dweights, places, 3, dx, _row(v3_ptr, token, row3, columns, inside))
            if S > 4:
                dweights = _set(dweights, places, 4, dx, _row(v4_ptr, token, row4, columns, inside))
            if S > 5:
                dweights = _set(dweights, places, 5, dx, _row(v5_ptr, token, row5, columns, inside))
            if S > 6:
                dweights = _set(dweights, places, 6, dx, _row(v6_ptr, token, row6, columns, inside))
            if S > 7:
                dweights = _set(dweights, places, 7, dx, _row(v7_ptr, token, row7, columns, inside))
            dscore = weights * (dweights - tl.sum(weights * dweights, 0))
            towards = dscore * inverse
            away = -towards * tl.where(there, score, 0.0) * inverse / D
            dq = _source_back(dv0_ptr, _row(v0_ptr, token, row0, columns, inside), token, columns, inside, dx, q_ptr,
                              dq, weights, towards, away, places, 0, D)
            if S > 1:
                dq = _source_back(dv1_ptr, _row(v1_ptr, token, row1, columns, inside), token, columns, inside, dx,
                                  q_ptr, dq, weights, towards, away, places, 1, D)
            if S > 2:
                dq = _source_back(dv2_ptr, _row(v2_ptr, token, row2, columns, inside), token, columns, inside, dx,
                                  q_ptr, dq, weights, towards, away, places, 2, D)
            if S > 3:
                dq = _source_back(dv3_ptr, _row(v3_ptr, token, row3, columns, inside), token, columns, inside, dx,
                                  q_ptr, dq, weights, towards, away, places, 3, D)
            if S > 4:
                dq = _source_back(dv4_ptr, _row(v4_ptr, token, row4, columns, inside), token, columns, inside, dx,
                                  q_ptr, dq, weights, towards, away, places, 4, D)
            if S > 5:
                dq = _source_back(dv5_ptr, _row(v5_ptr, token, row5, columns, inside), token, columns, inside, dx,
                                  q_ptr, dq, weights, towards, away, places, 5, D)
            if S > 6:
                dq = _source_back(dv6_ptr, _row(v6_ptr, token, row6, columns, inside), token, columns, inside, dx,
                                  q_ptr, dq, weights, towards, away, places, 6, D)
            if S > 7:
                dq = _source_back(dv7_ptr, _row(v7_ptr, token, row7, columns, inside), token, columns, inside, dx,
                                  q_ptr, dq, weights, towards, away, places, 7, D)
        token += token_step
    tl.store(dq_ptr + tl.program_id(0).to(tl.int64) * D + columns, dq, mask=inside)


def _sizes(sources: int, width: int) -> dict[str, int]:
    """Constants of a kernel, and its warps: 16 numbers of a row for each thread."""
    block = triton.next_power_of_2(width)
    return {"S": sources, "D": width, "BLOCK": block, "num_warps": max(1, block // 512)}


def _named(prefix: str, suffix: str, values: Sequence[Any], missing: Any) -> dict[str, Any]:
    """Arguments of the kernel for its sources by their names, `missing` for those that are not there."""
    padded = [*values, *[missing] * (MAX_TRITON_SOURCES - len(values))]
    return {f"{prefix}{index}{suffix}": value for index, value in enumerate(padded)}


class _DepthAttention(torch.autograd.Function):
    """Keeps the sources where they are, their scores and their inverse norms."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, eps: float, *sources: Tensor) -> Tensor:
        rows, query = [as_rows(source) for source in sources], query.contiguous()
        tokens, width = rows[0].shape
        score_NS, inverse_NS = (torch.empty(tokens, len(rows), dtype=torch.float32, device=query.device)
                                for _ in range(2))
        x = torch.empty(sources[-1].shape, dtype=sources[-1].dtype, device=query.device)
        _forward[(tokens,)](q_ptr=query, **_named("v", "_ptr", rows, None), score_ptr=score_NS,
                            inverse_ptr=inverse_NS, x_ptr=x, **_named("row", "", [r.stride(0) for r in rows], 0),
                            eps=eps, **_sizes(len(rows), width))
        ctx.save_for_backward(query, score_NS, inverse_NS, *sources)
        return x

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        query, score_NS, inverse_NS, *sources = ctx.saved_tensors
        rows, dx_ND = [as_rows(source) for source in sources], as_rows(dx)
        tokens, width = rows[0].shape
        P = max(1, min(tokens, programs(query.device)))
        found = [torch.empty(source.shape, dtype=source.dtype, device=query.device) for source in sources]
        dq_PD = torch.empty(P, width, dtype=torch.float32, device=query.device)
        _backward[(P,)](
            q_ptr=query, **_named("v", "_ptr", rows, None), score_ptr=score_NS, inverse_ptr=inverse_NS, dx_ptr=dx_ND,
            **_named("dv", "_ptr", found, None), dq_ptr=dq_PD, N=tokens, steps=triton.cdiv(tokens, P),
            **_named("row", "", [row.stride(0) for row in rows], 0), dx_row=dx_ND.stride(0),
            S_TILE=triton.next_power_of_2(len(rows)), **_sizes(len(rows), width))
        return dq_PD.sum(0).to(query.dtype), None, *found


def _compile_case(kernel: Any, sources: int, width: int) -> CompileCase:
    sizes = _sizes(sources, width)
    warps = sizes.pop("num_warps")
    absent = {name: None for prefix in ("v", "dv") for index in range(sources, MAX_TRITON_SOURCES)
              if (name := f"{prefix}{index}_ptr") in kernel.arg_names}
    if kernel is _backward:
        sizes["S_TILE"] = triton.next_power_of_2(sources)
    fp32 = ("q_ptr", "score_ptr", "inverse_ptr", "dq_ptr")
    types = {name: ("*fp32" if name in fp32 else "*bf16") if name.endswith("_ptr") else "i32"
             for name in kernel.arg_names if name not in absent and name not in sizes}
    types |= {"eps": "fp32"} if "eps" in types else {}
    strides = tuple(name for name in types if "row" in name)
    return CompileCase(f"{kernel.__name__.strip('_')}, {sources} sources of {width}", kernel, types, absent | sizes,
                       strides, warps)


COMPILE_CASES = [_compile_case(kernel, sources, width) for kernel in (_forward, _backward)
                 for sources, width in ((2, 512), (5, 2048), (MAX_TRITON_SOURCES, MAX_TRITON_WIDTH))]
