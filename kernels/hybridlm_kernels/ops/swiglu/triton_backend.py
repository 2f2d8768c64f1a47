"""SwiGLU as two elementwise Triton kernels over rows that may lie apart (halves of one projection).

M rows of D; contiguous tensors are one long row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase, as_rows


def swiglu(gate: Tensor, up: Tensor, limit: float | None = None, soft_caps: None = None) -> Tensor:
    """The Triton backend; arguments as in the public function, already checked."""
    return _TritonSwiGLU.apply(gate, up, limit)


@triton.jit
def clamped(gate, up, limit):
    """Both bounded; a NaN stays one, which a minimum would hide."""
    gate = tl.where(gate > limit, limit, gate)
    return gate, tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))


@triton.jit
def derivatives(gate, up, limit, CLAMPED: tl.constexpr):
    """silu(gate) * up and its derivatives by gate and by up, which are zero where a clamp holds."""
    g, u = gate, up
    if CLAMPED:
        g, u = clamped(gate, up, limit)
    sigmoid = tl.sigmoid(g)
    by_up = g * sigmoid
    by_gate = u * (sigmoid + by_up * (1.0 - sigmoid))
    act = by_up * u
    if CLAMPED:
        by_gate = tl.where(gate > limit, 0.0, by_gate)
        by_up = tl.where(tl.abs(up) > limit, 0.0, by_up)
    return act, by_gate, by_up


@triton.jit
def _row_and_columns(D, BLOCK: tl.constexpr):
    """The program's row and its columns of that row."""
    tiles = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    return row, (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward(gate_ptr, up_ptr, y_ptr, D, gate_row, up_row, limit, CLAMPED: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = _row_and_columns(D, BLOCK)
    inside = columns < D
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    if CLAMPED:
        gate, up = clamped(gate, up, limit)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * D + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, D, gate_row, up_row, dy_row, limit,
              CLAMPED: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = _row_and_columns(D, BLOCK)
    inside = columns < D
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
    _, by_gate, by_up = derivatives(gate, up, limit, CLAMPED)
    tl.store(dgate_ptr + row * D + columns, (dy * by_gate).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * D + columns, (dy * by_up).to(dup_ptr.dtype.element_ty), mask=inside)


def _launch(kernel, inputs: dict[str, Tensor], outputs: dict[str, Tensor], limit: float | None) -> None:
    """Launches a kernel on tensors by the names of its arguments."""
    joined = all(x.is_contiguous() for x in inputs.values())
    rows = {name: x.reshape(1, -1) if joined else as_rows(x) for name, x in inputs.items()}
    M, D = rows["gate"].shape
    block = min(triton.next_power_of_2(max(D, 1)), 2048)
    arguments: dict[str, Tensor | int] = {f"{name}_ptr": x for name, x in (rows | outputs).items()}
    arguments |= {f"{name}_row": x.stride(0) for name, x in rows.items()}
    kernel[(M * triton.cdiv(D, block),)](**arguments, D=D, limit=limit or 0.0, CLAMPED=limit is not None, BLOCK=block)


class _TritonSwiGLU(torch.autograd.Function):
    """SwiGLU with a backward of its own, which computes silu(gate) again."""

    @staticmethod
    def forward(ctx, gate, up, limit):
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch(_forward, {"gate": gate, "up": up}, {"y": y}, limit)
        return y

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        _launch(_backward, {"gate": gate, "up": up, "dy": dy}, {"dgate": dgate, "dup": dup}, ctx.limit)
        return dgate, dup, None


_ROWS = ("gate_row", "up_row", "dy_row")
COMPILE_CASES = [
    CompileCase(f"{kernel.__name__.strip('_')}{' clamped' if clamp else ''}", kernel,
             {name: "*bf16" if name.endswith("_ptr") else "fp32" if name == "limit" else "i32"
              for name in kernel.arg_names if name.islower() or name == "D"},
             {"CLAMPED": clamp, "BLOCK": 2048}, ("D", *(r for r in _ROWS if r in kernel.arg_names)))
    for kernel in (_forward, _backward) for clamp in (False, True)]
