"""Grouped matrix products of the routed experts, each with what comes before and after it in the same kernel.

N tokens, P rows in the order by expert, E experts, D model width, I expert width. Every program of a row product has
one tile of one expert's rows (see `Routes`) and a block of columns; every program of a weight's gradient has one block
of one expert's weight and walks over its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.moe.triton_routing import Routes
from hybridlm_kernels.ops.swiglu.triton_backend import clamped, derivatives
from hybridlm_kernels.triton_support import CompileCase, tuned

PARTIAL_SUM_COLUMNS = 64  # BLOCK_N of PAIRED: columns that one partial sum of a combining weight's gradient covers

# Configurations to tune: of kernels with two products or a long epilogue (PAIRED), of one product, and of the weights'
# gradients. The first of each fits every GPU that the backend runs on, in fp32 too.
PAIRED = [triton.Config({"BLOCK_N": PARTIAL_SUM_COLUMNS, "BLOCK_K": k}, num_warps=8, num_stages=s)
          for k, s in ((32, 3), (64, 3), (64, 4))]
GATE_UP = [*PAIRED, triton.Config({"BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3)]  # asks less of L2
PLAIN = [triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=w, num_stages=s)
         for n, k, w, s in ((64, 32, 4, 3), (128, 64, 8, 3), (128, 64, 4, 4), (256, 64, 8, 3))]
WEIGHTS = [triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=w, num_stages=s)
           for m, n, k, w, s in ((64, 64, 32, 4, 3), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 256, 64, 8, 3))]


@triton.jit
def _tile(tile_expert_ptr, tile_row_ptr, end_ptr, columns, E, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Expert (E: no such tile), first row, which of the BLOCK_M rows are the expert's, columns, block of columns."""
    blocks = tl.cdiv(columns, BLOCK_N)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    first = tl.load(tile_row_ptr + tile).to(tl.int64)
    own = first + tl.arange(0, BLOCK_M) < tl.load(end_ptr + expert, mask=expert < E, other=0)
    return expert, first, own, block * BLOCK_N + tl.arange(0, BLOCK_N), block


@tuned(GATE_UP, ["D", "I", "BLOCK_M", "KEEP"])
@triton.jit
def _gate_up(x_ptr, w_ptr, weight_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, end_ptr, h_ptr, act_ptr, E, limit,
             CLAMPED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, A: tl.constexpr, D: tl.constexpr,
             I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """act[p] = weight_p swiglu(W_e x[token of p]); h keeps gate and up."""
    expert, first, own, column, _ = _tile(tile_expert_ptr, tile_row_ptr, end_ptr, I, E, BLOCK_M, BLOCK_N)
    if expert < E:
        row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        pair = tl.load(pair_ptr + first + row, mask=own, other=0)
        x_at = x_ptr + ((pair // A).to(tl.int64) * D)[:, None] + k[None, :]
        w_ptr += expert * (2 * I * D)
        w_at = (column * D)[None, :] + k[:, None]
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, D, BLOCK_K):
            x = tl.load(x_at + start, mask=own[:, None] & (start + k < D)[None, :], other=0.0)
            there = (start + k < D)[:, None] & (column < I)[None, :]
            gate = tl.dot(x, tl.load(w_ptr + start + w_at, mask=there, other=0.0), gate, input_precision=PRECISION)
            up = tl.dot(x, tl.load(w_ptr + start + I * D + w_at, mask=there, other=0.0), up, input_precision=PRECISION)
        inside = own[:, None] & (column < I)[None, :]
        if KEEP:
            h_ptr += first * (2 * I)
            h_at = (row * (2 * I))[:, None] + column[None, :]
            tl.store(h_ptr + h_at, gate.to(h_ptr.dtype.element_ty), mask=inside)
            tl.store(h_ptr + I + h_at, up.to(h_ptr.dtype.element_ty), mask=inside)
        if CLAMPED:
            gate, up = clamped(gate, up, limit)
        weight = tl.load(weight_ptr + pair, mask=own, other=0.0).to(tl.float32)
        act = gate * tl.sigmoid(gate) * up * weight[:, None]
        tl.store(act_ptr + first * I + ((row * I)[:, None] + column[None, :]), act.to(act_ptr.dtype.element_ty),
                 mask=inside)


@tuned(PLAIN, ["K", "N", "BLOCK_M", "TRANSPOSED"])
@triton.jit
def _rows(a_ptr, w_ptr, tile_expert_ptr, tile_row_ptr, end_ptr, y_ptr, E, TRANSPOSED: tl.constexpr,
          PRECISION: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr):
    """y[p] = W_e a[p] with W [N, K], or TRANSPOSED, W [K, N]."""
    expert, first, own, column, _ = _tile(tile_expert_ptr, tile_row_ptr, end_ptr, N, E, BLOCK_M, BLOCK_N)
    if expert < E:
        row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        a_ptr += first * K
        a_at = (row * K)[:, None] + k[None, :]
        k_step = N if TRANSPOSED else 1
        n_step = 1 if TRANSPOSED else K
        w_ptr += expert * (N * K)
        w_at = (column * n_step)[None, :] + (k * k_step)[:, None]
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            a = tl.load(a_ptr + start + a_at, mask=own[:, None] & (start + k < K)[None, :], other=0.0)
            w = tl.load(w_ptr + start * k_step + w_at, mask=(start + k < K)[:, None] & (column < N)[None, :], other=0.0)
            y = tl.dot(a, w, y, input_precision=PRECISION)
        tl.store(y_ptr + first * N + ((row * N)[:, None] + column[None, :]), y.to(y_ptr.dtype.element_ty),
                 mask=own[:, None] & (column < N)[None, :])


@tuned(PAIRED, ["D", "I", "BLOCK_M"])
@triton.jit
def _activation_gradient(dy_ptr, w_ptr, h_ptr, weight_ptr, pair_ptr, tile_expert_ptr, tile_row_ptr, end_ptr, dh_ptr,
                         act_ptr, dweight_ptr, E, limit, CLAMPED: tl.constexpr, PRECISION: tl.constexpr,
                         A: tl.constexpr, D: tl.constexpr, I: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """From dact = W_e^T dy[token of p] with W [D, I]: gradients of gate and up, the weighted activation again, and
    this block's share of the weight's gradient, dact . act."""
    expert, first, own, column, block = _tile(tile_expert_ptr, tile_row_ptr, end_ptr, I, E, BLOCK_M, BLOCK_N)
    if expert < E:
        row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        pair = tl.load(pair_ptr + first + row, mask=own, other=0)
        dy_at = dy_ptr + ((pair // A).to(tl.int64) * D)[:, None] + k[None, :]
        w_ptr += expert * (D * I)
        w_at = column[None, :] + (k * I)[:, None]
        dact = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, D, BLOCK_K):
            dy = tl.load(dy_at + start, mask=own[:, None] & (start + k < D)[None, :], other=0.0)
            w = tl.load(w_ptr + start * I + w_at, mask=(start + k < D)[:, None] & (column < I)[None, :], other=0.0)
            dact = tl.dot(dy, w, dact, input_precision=PRECISION)
        inside = own[:, None] & (column < I)[None, :]
        h_at = (row * (2 * I))[:, None] + column[None, :]
        gate = tl.load(h_ptr + first * (2 * I) + h_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + first * (2 * I) + I + h_at, mask=inside, other=0.0).to(tl.float32)
        act, by_gate, by_up = derivatives(gate, up, limit, CLAMPED)
        tl.store(dweight_ptr + first * tl.cdiv(I, BLOCK_N) + (row * tl.cdiv(I, BLOCK_N) + block),
                 tl.sum(dact * act, axis=1), mask=own)
        weight = tl.load(weight_ptr + pair, mask=own, other=0.0).to(tl.float32)[:, None]
        tl.store(act_ptr + first * I + ((row * I)[:, None] + column[None, :]),
                 (act * weight).to(act_ptr.dtype.element_ty), mask=inside)
        dact *= weight
        tl.store(dh_ptr + first * (2 * I) + h_at, (dact * by_gate).to(dh_ptr.dtype.element_ty), mask=inside)
        tl.store(dh_ptr + first * (2 * I) + I + h_at, (dact * by_up).to(dh_ptr.dtype.element_ty), mask=inside)


@tuned(WEIGHTS, ["M", "N", "GATHER_A"])
@triton.jit
def _weight_gradient(a_ptr, b_ptr, pair_ptr, end_ptr, dw_ptr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
                     PRECISION: tl.constexpr, A: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """dw[e] = sum over the rows p of e of a[p] b[p]^T; a gathered operand is read at the token of p."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M * columns
    expert, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    m = block // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    end = tl.load(end_ptr + expert).to(tl.int32)
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_K):
        row = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_row, b_row = row, row
        if GATHER_A:
            a_row = tl.load(pair_ptr + row, mask=row < end, other=0).to(tl.int64) // A
        if GATHER_B:
            b_row = tl.load(pair_ptr + row, mask=row < end, other=0).to(tl.int64) // A
        own = (row < end)[:, None]
        a = tl.load(a_ptr + (a_row * M)[:, None] + m[None, :], mask=own & (m < M)[None, :], other=0.0)
        b = tl.load(b_ptr + (b_row * N)[:, None] + n[None, :], mask=own & (n < N)[None, :], other=0.0)
        dw = tl.dot(tl.trans(a), b, dw, input_precision=PRECISION)
    at = expert * (M * N) + (m.to(tl.int64) * N)[:, None] + n[None, :]
    tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _precision(x: Tensor) -> str:
    """Precision of products of fp32, as torch is set to compute them."""
    return "ieee" if x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def _grid(routes: Routes, columns: int):
    return lambda meta: (routes.tiles * triton.cdiv(columns, meta["BLOCK_N"]),)


def gate_up(x_ND: Tensor, gate_up_E2ID: Tensor, weights_NA: Tensor, routes: Routes, limit: float | None,
            keep: bool) -> tuple[Tensor | None, Tensor]:
    """h [P, 2I], gate and up of every row, where they are to be kept, and the weighted activation [P, I]."""
    (E, _, D), P, I = gate_up_E2ID.shape, routes.pair_P.numel(), gate_up_E2ID.shape[1] // 2
    h_P2I = torch.empty(P, 2 * I, dtype=x_ND.dtype, device=x_ND.device) if keep else None
    act_PI = torch.empty(P, I, dtype=x_ND.dtype, device=x_ND.device)
    _gate_up[_grid(routes, I)](
        x_ptr=x_ND, w_ptr=gate_up_E2ID, weight_ptr=weights_NA, pair_ptr=routes.pair_P,
        tile_expert_ptr=routes.tile_expert, tile_row_ptr=routes.tile_row, end_ptr=routes.end_E, h_ptr=h_P2I,
        act_ptr=act_PI, E=E, limit=limit or 0.0, CLAMPED=limit is not None, KEEP=keep, PRECISION=_precision(x_ND),
        A=weights_NA.shape[1], D=D, I=I, BLOCK_M=routes.block_m)
    return h_P2I, act_PI


def rows(a_PK: Tensor, weight: Tensor, routes: Routes, transposed: bool = False) -> Tensor:
    """[P, N]: each row times its expert's weight [E, N, K], or `transposed`, [E, K, N]."""
    (P, K), N = a_PK.shape, weight.shape[2 if transposed else 1]
    y_PN = torch.empty(P, N, dtype=a_PK.dtype, device=a_PK.device)
    _rows[_grid(routes, N)](
        a_ptr=a_PK, w_ptr=weight, tile_expert_ptr=routes.tile_expert, tile_row_ptr=routes.tile_row,
        end_ptr=routes.end_E, y_ptr=y_PN, E=weight.shape[0], TRANSPOSED=transposed, PRECISION=_precision(a_PK), K=K,
        N=N, BLOCK_M=routes.block_m)
    return y_PN


def activation_gradient(dy_ND: Tensor, down_EDI: Tensor, h_P2I: Tensor, weights_NA: Tensor, routes: Routes,
                        limit: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of h, the weighted activation [P, I], and the gradient of every row's weight [P] in fp32."""
    (E, D, I), P = down_EDI.shape, len(h_P2I)
    dh_P2I, act_PI = torch.empty_like(h_P2I), torch.empty(P, I, dtype=h_P2I.dtype, device=h_P2I.device)
    dweight_PS = torch.empty(P, triton.cdiv(I, PARTIAL_SUM_COLUMNS), dtype=torch.float32, device=h_P2I.device)
    _activation_gradient[_grid(routes, I)](
        dy_ptr=dy_ND, w_ptr=down_EDI, h_ptr=h_P2I, weight_ptr=weights_NA, pair_ptr=routes.pair_P,
        tile_expert_ptr=routes.tile_expert, tile_row_ptr=routes.tile_row, end_ptr=routes.end_E, dh_ptr=dh_P2I,
        act_ptr=act_PI, dweight_ptr=dweight_PS, E=E, limit=limit or 0.0, CLAMPED=limit is not None,
        PRECISION=_precision(dy_ND), A=weights_NA.shape[1], D=D, I=I, BLOCK_M=routes.block_m)
    return dh_P2I, act_PI, dweight_PS.sum(1)


def weight_gradient(a: Tensor, b: Tensor, routes: Routes, *, tokens: str) -> Tensor:
    """[E, M, N]: the sum of a_p b_p^T over each expert's rows; the operand that `tokens` names, "a" or "b",
    has one row per token."""
    E, M, N = routes.end_E.numel(), a.shape[1], b.shape[1]
    dw_EMN = torch.empty(E, M, N, dtype=a.dtype, device=a.device)
    _weight_gradient[lambda meta: (E * triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]),)](
        a_ptr=a, b_ptr=b, pair_ptr=routes.pair_P, end_ptr=routes.end_E, dw_ptr=dw_EMN, GATHER_A=tokens == "a",
        GATHER_B=tokens == "b", PRECISION=_precision(a), A=routes.slot_NA.shape[1], M=M, N=N)
    return dw_EMN


_TYPES = dict.fromkeys(("x_ptr", "w_ptr", "a_ptr", "b_ptr", "y_ptr", "dy_ptr", "h_ptr", "dh_ptr", "act_ptr", "dw_ptr"),
                       "*bf16")
_TYPES |= {"weight_ptr": "*fp32", "dweight_ptr": "*fp32", "pair_ptr": "*i32", "tile_expert_ptr": "*i32",
           "tile_row_ptr": "*i32", "end_ptr": "*i64", "E": "i32", "limit": "fp32"}


def _compile_case(kernel, label: str, **constants) -> CompileCase:
    types = {name: kind for name, kind in _TYPES.items() if name in kernel.fn.arg_names}
    return CompileCase(label, kernel, types, constants | {"PRECISION": "ieee"})


_SIZES = {"A": 8, "D": 2048, "I": 768}
COMPILE_CASES = [
    _compile_case(_gate_up, "gate and up", CLAMPED=True, KEEP=True, BLOCK_M=128, **_SIZES),
    _compile_case(_rows, "down", TRANSPOSED=False, BLOCK_M=128, K=768, N=2048),
    _compile_case(_rows, "down, few rows", TRANSPOSED=False, BLOCK_M=16, K=768, N=2048),
    _compile_case(_rows, "gradient of x", TRANSPOSED=True, BLOCK_M=128, K=1536, N=2048),
    _compile_case(_activation_gradient, "gradient of the activation", CLAMPED=True, BLOCK_M=128, **_SIZES),
    _compile_case(_weight_gradient, "gradient of down", GATHER_A=True, GATHER_B=False, A=8, M=2048, N=768)]
