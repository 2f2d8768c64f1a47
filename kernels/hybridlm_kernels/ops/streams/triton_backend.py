"""Reads and writes of residual streams as Triton kernels: a program has all streams of one token, and reads each once.

N tokens, M streams (`M_TILE`: their tile, a power of two), D model width in blocks of BLOCK.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.streams import MAX_TRITON_STREAMS
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase, as_rows

TILE = 4096  # elements of a tile of the streams
BACKWARD_TILE = 2048  # where a program holds tiles of streams and of their gradients, and sums over channels


def read_streams(streams: Tensor, read: Tensor) -> Tensor:
    """The Triton backend; arguments as in the public function, already checked."""
    return _Read.apply(streams, read)


def write_streams(streams: Tensor, carry: Tensor | None, write: Tensor, output: Tensor) -> Tensor:
    """The Triton backend; arguments as in the public function, already checked."""
    return _Write.apply(streams, carry, write, output)


@triton.jit
def _token(M: tl.constexpr, M_TILE: tl.constexpr):
    """The program's token, the streams [M_TILE], and which of these exist."""
    streams = tl.arange(0, M_TILE)
    return tl.program_id(0).to(tl.int64), streams, streams < M


@triton.jit
def _columns(start, D: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of a block [BLOCK], and which of these exist."""
    columns = start + tl.arange(0, BLOCK)
    return columns, columns < D


@triton.jit
def _read(x_ptr, read_ptr, y_ptr, x_row, x_stream, M: tl.constexpr, D: tl.constexpr, M_TILE: tl.constexpr,
          BLOCK: tl.constexpr):
    token, _, _ = _token(M, M_TILE)
    for start in range(0, D, BLOCK):
        columns, inside = _columns(start, D, BLOCK)
        y = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(M):
            x = tl.load(x_ptr + token * x_row + i * x_stream + columns, mask=inside, other=0.0).to(tl.float32)
            y += tl.load(read_ptr + token * M + i).to(tl.float32) * x
        tl.store(y_ptr + token * D + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _read_back(x_ptr, read_ptr, dy_ptr, dx_ptr, dread_ptr, x_row, x_stream, dy_row, M: tl.constexpr,
               D: tl.constexpr, M_TILE: tl.constexpr, BLOCK: tl.constexpr):
    token, streams, exist = _token(M, M_TILE)
    read = tl.load(read_ptr + token * M + streams, mask=exist, other=0.0).to(tl.float32)
    dread = tl.zeros([M_TILE], tl.float32)
    for start in range(0, D, BLOCK):
        columns, inside = _columns(start, D, BLOCK)
        mask = exist[:, None] & inside[None, :]
        x = tl.load(x_ptr + token * x_row + streams[:, None] * x_stream + columns[None, :], mask=mask,
                    other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + token * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
        dread += tl.sum(x * dy[None, :], 1)
        dx = read[:, None] * dy[None, :]
        tl.store(dx_ptr + (token * M + streams[:, None]) * D + columns[None, :], dx.to(dx_ptr.dtype.element_ty),
                 mask=mask)
    tl.store(dread_ptr + token * M + streams, dread.to(dread_ptr.dtype.element_ty), mask=exist)


@triton.jit
def _write(x_ptr, carry_ptr, write_ptr, out_ptr, y_ptr, x_row, x_stream, out_row, CARRY: tl.constexpr,
           M: tl.constexpr, D: tl.constexpr, M_TILE: tl.constexpr, BLOCK: tl.constexpr):
    token, streams, exist = _token(M, M_TILE)
    write = tl.load(write_ptr + token * M + streams, mask=exist, other=0.0).to(tl.float32)
    for start in range(0, D, BLOCK):
        columns, inside = _columns(start, D, BLOCK)
        mask = exist[:, None] & inside[None, :]
        out = tl.load(out_ptr + token * out_row + columns, mask=inside, other=0.0).to(tl.float32)
        y = write[:, None] * out[None, :]
        if CARRY:
            for i in tl.static_range(M):
                x = tl.load(x_ptr + token * x_row + i * x_stream + columns, mask=inside, other=0.0).to(tl.float32)
                to_all = tl.load(carry_ptr + (token * M + i) * M + streams, mask=exist, other=0.0).to(tl.float32)
                y += to_all[:, None] * x[None, :]
        else:
            y += tl.load(x_ptr + token * x_row + streams[:, None] * x_stream + columns[None, :], mask=mask,
                         other=0.0).to(tl.float32)
        tl.store(y_ptr + (token * M + streams[:, None]) * D + columns[None, :], y.to(y_ptr.dtype.element_ty),
                 mask=mask)


@triton.jit
def _write_back(x_ptr, carry_ptr, write_ptr, out_ptr, dy_ptr, dx_ptr, dcarry_ptr, dwrite_ptr, dout_ptr, x_row,
                x_stream, out_row, dy_row, dy_stream, CARRY: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
                M_TILE: tl.constexpr, BLOCK: tl.constexpr):
    token, streams, exist = _token(M, M_TILE)
    dwrite = tl.zeros([M_TILE], tl.float32)
    dcarry = tl.zeros([M_TILE, M_TILE], tl.float32)
    for start in range(0, D, BLOCK):
        columns, inside = _columns(start, D, BLOCK)
        mask = exist[:, None] & inside[None, :]
        out = tl.load(out_ptr + token * out_row + columns, mask=inside, other=0.0).to(tl.float32)
        dout = tl.zeros([BLOCK], tl.float32)
        if CARRY:
            x = tl.load(x_ptr + token * x_row + streams[:, None] * x_stream + columns[None, :], mask=mask,
                        other=0.0).to(tl.float32)
            dx = tl.zeros([M_TILE, BLOCK], tl.float32)
        for j in tl.static_range(M):
            dy = tl.load(dy_ptr + token * dy_row + j * dy_stream + columns, mask=inside, other=0.0).to(tl.float32)
            dout += tl.load(write_ptr + token * M + j).to(tl.float32) * dy
            dwrite += tl.where(streams == j, tl.sum(out * dy, 0), 0.0)
            if CARRY:
                from_all = tl.load(carry_ptr + (token * M + streams) * M + j, mask=exist, other=0.0).to(tl.float32)
                dx += from_all[:, None] * dy[None, :]
                dcarry += tl.where((streams == j)[None, :], tl.sum(x * dy[None, :], 1)[:, None], 0.0)
        tl.store(dout_ptr + token * D + columns, dout.to(dout_ptr.dtype.element_ty), mask=inside)
        if CARRY:
            tl.store(dx_ptr + (token * M + streams[:, None]) * D + columns[None, :],
                     dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dwrite_ptr + token * M + streams, dwrite.to(dwrite_ptr.dtype.element_ty), mask=exist)
    if CARRY:
        tl.store(dcarry_ptr + (token * M + streams[:, None]) * M + streams[None, :],
                 dcarry.to(dcarry_ptr.dtype.element_ty), mask=exist[:, None] & exist[None, :])


def _as_tokens(x: Tensor) -> Tensor:
    """View of streams as [N, M, D] with contiguous channels; copied only where their strides demand it."""
    x_NMD = x.reshape(-1, *x.shape[-2:])
    return x_NMD if x_NMD.stride(2) == 1 else x_NMD.contiguous()


def _sizes(M: int, D: int, elements: int = TILE) -> dict[str, int]:
    """Constants of a kernel, and its warps: 16 elements of the tile for each thread."""
    tile = triton.next_power_of_2(M)
    block = min(triton.next_power_of_2(D), elements // tile)
    return {"M": M, "D": D, "M_TILE": tile, "BLOCK": block, "num_warps": max(1, tile * block // 512)}


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _Read(torch.autograd.Function):
    """A weighted sum over streams."""

    @staticmethod
    def forward(ctx, streams, read):
        read = read.contiguous()
        ctx.save_for_backward(streams, read)
        x_NMD = _as_tokens(streams)
        N, M, D = x_NMD.shape
        y = torch.empty((*streams.shape[:-2], D), dtype=streams.dtype, device=streams.device)
        _read[(N,)](x_ptr=x_NMD, read_ptr=read, y_ptr=y, x_row=x_NMD.stride(0), x_stream=x_NMD.stride(1),
                    **_sizes(M, D))
        return y

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        streams, read = ctx.saved_tensors
        x_NMD, dy_ND = _as_tokens(streams), as_rows(dy)
        N, M, D = x_NMD.shape
        dx, dread = _empty_like(streams), _empty_like(read)
        _read_back[(N,)](x_ptr=x_NMD, read_ptr=read, dy_ptr=dy_ND, dx_ptr=dx, dread_ptr=dread, x_row=x_NMD.stride(0),
                         x_stream=x_NMD.stride(1), dy_row=dy_ND.stride(0), **_sizes(M, D))
        return dx, dread


class _Write(torch.autograd.Function):
    """Weighted sums of the streams, and a branch's output added to each."""

    @staticmethod
    def forward(ctx, streams, carry, write, output):
        write, carry = write.contiguous(), None if carry is None else carry.contiguous()
        # Without carry weights the streams have the gradient of the result, and are not needed.
        ctx.save_for_backward(None if carry is None else streams, carry, write, output)
        ctx.dtype = streams.dtype
        x_NMD, out_ND = _as_tokens(streams), as_rows(output)
        N, M, D = x_NMD.shape
        y = _empty_like(streams)
        _write[(N,)](x_ptr=x_NMD, carry_ptr=carry, write_ptr=write, out_ptr=out_ND, y_ptr=y, x_row=x_NMD.stride(0),
                     x_stream=x_NMD.stride(1), out_row=out_ND.stride(0), CARRY=carry is not None, **_sizes(M, D))
        return y

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        streams, carry, write, output = ctx.saved_tensors
        dy_NMD, out_ND = _as_tokens(dy), as_rows(output)
        N, M, D = dy_NMD.shape
        dcarry, dwrite, doutput = None if carry is None else _empty_like(carry), _empty_like(write), _empty_like(output)
        dx, x_strides = dy.to(ctx.dtype), {"x_row": 0, "x_stream": 0}
        if carry is not None:
            streams = _as_tokens(streams)
            dx, x_strides = _empty_like(dy), {"x_row": streams.stride(0), "x_stream": streams.stride(1)}
        _write_back[(N,)](
            x_ptr=streams, carry_ptr=carry, write_ptr=write, out_ptr=out_ND, dy_ptr=dy_NMD,
            dx_ptr=None if carry is None else dx, dcarry_ptr=dcarry, dwrite_ptr=dwrite, dout_ptr=doutput, **x_strides,
            out_row=out_ND.stride(0), dy_row=dy_NMD.stride(0), dy_stream=dy_NMD.stride(1), CARRY=carry is not None,
            **_sizes(M, D, BACKWARD_TILE))
        return dx, dcarry, dwrite, doutput


_WEIGHTS = ("read_ptr", "dread_ptr", "carry_ptr", "dcarry_ptr", "write_ptr", "dwrite_ptr")
_ABSENT = ("carry_ptr", "dcarry_ptr", "dx_ptr")  # without carry weights


def _compile_case(kernel, M: int, D: int, carry: bool | None) -> CompileCase:
    sizes = _sizes(M, D, BACKWARD_TILE if kernel is _write_back else TILE)
    warps = sizes.pop("num_warps")
    absent = {} if carry is not False else {n: None for n in kernel.arg_names if n in _ABSENT}
    if absent and kernel is _write_back:
        absent["x_ptr"] = None
    types = {name: ("*fp32" if name in _WEIGHTS else "*bf16") if name.endswith("_ptr") else "i32"
             for name in kernel.arg_names if name.islower() and name not in absent}
    strides = tuple(name for name, type_ in types.items() if type_ == "i32")
    mixed = "" if carry is None else ", mixed" if carry else ", unmixed"
    return CompileCase(f"{kernel.__name__.strip('_').replace('_', ' ')}, {M} streams of {D}{mixed}", kernel, types,
                       absent | sizes | ({} if carry is None else {"CARRY": carry}), strides, warps)


COMPILE_CASES = [
    *(_compile_case(kernel, M, D, None) for kernel in (_read, _read_back) for M, D in ((4, 2048), (3, 512))),
    *(_compile_case(kernel, M, D, carry) for kernel in (_write, _write_back)
      for M, D, carry in ((4, 2048, True), (4, 4096, True), (MAX_TRITON_STREAMS, 2048, True), (4, 2048, False)))]
