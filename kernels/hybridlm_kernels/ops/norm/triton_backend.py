"""Norms as one pair of Triton kernels: a program holds whole rows in registers, so that every tensor is read once.

M rows of D. All norms are y = x r w act(gate) with r = (scale sum(x^2) + eps)^(-1/2): scale is 1 / D for an RMS norm
and 1 for the L2 norm, which has no w. P programs of the backward each sum their own rows' gradient of w.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.norm import MAX_TRITON_ROW
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase, as_rows, programs


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    return _Norm.apply(x, None, weight, eps, 1.0 / x.shape[-1], 1.0 if zero_centered else 0.0, "none")


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str = "silu") -> Tensor:
    return _Norm.apply(x, gate, weight, eps, 1.0 / x.shape[-1], 0.0, activation)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    return _Norm.apply(x, None, None, eps, 1.0, 0.0, "none")


@triton.jit
def _rows(M, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """The program's first rows [ROWS, 1], the columns [1, BLOCK_D], and which of these exist."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    return rows, columns, columns < D


@triton.jit
def _forward(x_ptr, gate_ptr, w_ptr, y_ptr, M, x_row, gate_row, eps, scale, shift, ACT: tl.constexpr,
             WEIGHT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    rows, columns, exists = _rows(M, D, BLOCK_D, ROWS)
    inside = (rows < M) & exists
    x = tl.load(x_ptr + rows * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) * scale + eps)
    if WEIGHT:
        y *= tl.load(w_ptr + columns, mask=exists, other=0.0).to(tl.float32) + shift
    if ACT != "none":
        gate = tl.load(gate_ptr + rows * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
        y *= tl.sigmoid(gate) * gate if ACT == "silu" else tl.sigmoid(gate)
    tl.store(y_ptr + rows * D + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["steps"])
def _backward(x_ptr, gate_ptr, w_ptr, dy_ptr, dx_ptr, dgate_ptr, dw_ptr, M, steps, x_row, gate_row, dy_row, eps,
              scale, shift, ACT: tl.constexpr, WEIGHT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              ROWS: tl.constexpr):
    rows, columns, exists = _rows(M, D, BLOCK_D, ROWS)
    row_step = tl.num_programs(0).to(tl.int64) * ROWS
    if WEIGHT:
        w = tl.load(w_ptr + columns, mask=exists, other=0.0).to(tl.float32) + shift
    dw = tl.zeros([BLOCK_D], tl.float32)
    for _ in range(steps):
        inside = (rows < M) & exists
        x = tl.load(x_ptr + rows * x_row + columns, mask=inside, other=0.0).to(tl.float32)
        dn = tl.load(dy_ptr + rows * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) * scale + eps)
        r = tl.where(rows < M, r, 0.0)  # infinite in rows past the end when eps is 0
        n = x * r
        if ACT != "none":
            gate = tl.load(gate_ptr + rows * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            slope = sigmoid * (1.0 - sigmoid)
            dact = dn * n * w
            dgate = dact * (sigmoid + gate * slope) if ACT == "silu" else dact * slope
            tl.store(dgate_ptr + rows * D + columns, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
            dn *= sigmoid * gate if ACT == "silu" else sigmoid
        if WEIGHT:
            dw += tl.sum(dn * n, axis=0)
            dn *= w
        dx = r * (dn - n * tl.sum(dn * n, axis=1, keep_dims=True) * scale)
        tl.store(dx_ptr + rows * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        rows += row_step
    if WEIGHT:
        at = tl.arange(0, BLOCK_D)
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * D + at, dw, mask=at < D)


def _tile(D: int, elements: int) -> dict[str, int]:
    """BLOCK_D, ROWS and num_warps for about `elements` per program and 16 to 32 per thread."""
    block = triton.next_power_of_2(D)
    rows = max(1, elements // block)
    return {"BLOCK_D": block, "ROWS": rows, "num_warps": min(16, max(4, rows * block // elements * 4))}


class _Norm(torch.autograd.Function):
    """Any of the norms; only inputs are kept: r is computed again from the row, which the backward reads anyway."""

    @staticmethod
    def forward(ctx, x, gate, weight, eps, scale, shift, act):
        weight = None if weight is None else weight.contiguous()
        ctx.save_for_backward(x, gate, weight)
        ctx.options = {"eps": eps, "scale": scale, "shift": shift, "ACT": act, "WEIGHT": weight is not None,
                       "D": x.shape[-1]}
        x_MD, gate_MD = as_rows(x), None if gate is None else as_rows(gate)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        M, D = x_MD.shape
        tile = _tile(D, 4096)
        _forward[(triton.cdiv(M, tile["ROWS"]),)](
            x_ptr=x_MD, gate_ptr=gate_MD, w_ptr=weight, y_ptr=y, M=M, x_row=x_MD.stride(0),
            gate_row=0 if gate_MD is None else gate_MD.stride(0), **ctx.options, **tile)
        return y

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        x, gate, weight = ctx.saved_tensors
        x_MD, dy_MD, gate_MD = as_rows(x), as_rows(dy), None if gate is None else as_rows(gate)
        M, D = x_MD.shape
        tile = _tile(D, 2048)
        P = max(1, min(triton.cdiv(M, tile["ROWS"]), programs(x.device)))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
        dw_PD = None if weight is None else torch.empty(P, D, dtype=torch.float32, device=x.device)
        _backward[(P,)](
            x_ptr=x_MD, gate_ptr=gate_MD, w_ptr=weight, dy_ptr=dy_MD, dx_ptr=dx, dgate_ptr=dgate, dw_ptr=dw_PD, M=M,
            steps=triton.cdiv(M, P * tile["ROWS"]), x_row=x_MD.stride(0),
            gate_row=0 if gate_MD is None else gate_MD.stride(0), dy_row=dy_MD.stride(0), **ctx.options, **tile)
        dw = None if dw_PD is None else dw_PD.sum(0).to(weight.dtype)
        return dx, dgate, dw, None, None, None, None


_TYPES = {"x_ptr": "*bf16", "w_ptr": "*fp32", "y_ptr": "*bf16", "dy_ptr": "*bf16", "dx_ptr": "*bf16",
          "dw_ptr": "*fp32", "M": "i32", "steps": "i32", "x_row": "i32", "gate_row": "i32", "dy_row": "i32",
          "eps": "fp32", "scale": "fp32", "shift": "fp32"}


def _compile_case(kernel, elements: int, D: int, act: str) -> CompileCase:
    tile = _tile(D, elements)
    gate = {"gate_ptr": "*bf16", "dgate_ptr": "*bf16"} if act != "none" else {}
    names = kernel.arg_names
    constants = {"ACT": act, "WEIGHT": True, "D": D, "BLOCK_D": tile["BLOCK_D"], "ROWS": tile["ROWS"]}
    constants |= {name: None for name in ("gate_ptr", "dgate_ptr") if name in names and not gate}
    return CompileCase(f"{kernel.__name__.strip('_')} {act} D={D}", kernel,
                    {n: t for n, t in (_TYPES | gate).items() if n in names}, constants,
                    ("x_row", "gate_row", "dy_row"), tile["num_warps"])


COMPILE_CASES = [_compile_case(kernel, elements, D, act) for kernel, elements in ((_forward, 4096), (_backward, 2048))
             for D, act in ((64, "none"), (128, "silu"), (2048, "sigmoid"), (MAX_TRITON_ROW, "silu"))]
