"""The indexer's loss over listed keys as Triton kernels, a block of queries at a time.

T queries and S keys per row, J index heads, I index dim, H query heads, G key heads, K key dim (as K0 + K1), N listed
keys per query. Programs count the queries of a block from its first token, `start`, on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.sparse_attention.triton_inverse import InverseLists
from hybridlm_kernels.ops.sparse_attention.triton_tiles import LOG2_E, TileSizes, heads_of, load_rows
from hybridlm_kernels.triton_support import CompileCase, tuned

_tuned = tuned([triton.Config({}, num_warps=8, num_stages=1), triton.Config({}, num_warps=4, num_stages=3)],
               key=["H", "G", "K"])
_tuned_index = tuned([triton.Config({}, num_warps=4, num_stages=1), triton.Config({}, num_warps=4, num_stages=3)],
                     key=["J", "I"])


@_tuned
@triton.jit(do_not_specialize=["start"])
def _log_sums(q_ptr, k_ptr, index_ptr, lse_ptr, scale, start, T, S, N, H, G, K: tl.constexpr, K0: tl.constexpr,
              K1: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """lse[q, h]: log2 of the sum of exp2 over the listed keys, 0 if there are none. `scale` includes log2 e."""
    local = tl.program_id(0).to(tl.int64)
    token = start + local
    g, first, in_tile, has = heads_of(tl.program_id(1), H, G, BLOCK_H)
    c0, c1, h = tl.arange(0, K0), K0 + tl.arange(0, max(K1, 1)), first + in_tile
    at = (token * H + h) * K
    q0 = load_rows(q_ptr, at, has, c0, 0, K)
    if K1 > 0:
        q1 = load_rows(q_ptr, at, has, c1, K0, K)
    keys = k_ptr + (token // T * S * G + g) * K
    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for begin in tl.range(0, N, BLOCK_N, disable_licm=True):
        n = begin + tl.arange(0, BLOCK_N)
        s = tl.load(index_ptr + token * N + n, mask=n < N, other=-1)
        row = tl.maximum(s, 0).to(tl.int64) * (G * K)
        score = tl.dot(q0, tl.trans(load_rows(keys, row, s >= 0, c0, 0, K)), input_precision="ieee")
        if K1 > 0:
            score = tl.dot(q1, tl.trans(load_rows(keys, row, s >= 0, c1, K0, K)), score, input_precision="ieee")
        score = tl.where((s >= 0)[None, :], score * scale, float("-inf"))
        above = tl.maximum(most, tl.max(score, 1))
        pivot = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(most - pivot) + tl.sum(tl.exp2(score - pivot[:, None]), 1)
        most = above
    some = total > 0
    tl.store(lse_ptr + local * H + h, tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), 0.0), mask=has)


@_tuned
@triton.jit(do_not_specialize=["start"])
def _attention(q_ptr, k_ptr, index_ptr, lse_ptr, p_ptr, scale, start, T, S, N, H, G, K: tl.constexpr,
               K0: tl.constexpr, K1: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """p[q, n]: the mean over heads of the softmax over the listed keys, 0 where none is listed."""
    local = tl.program_id(1).to(tl.int64)
    token = start + local
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c0, c1 = tl.arange(0, K0), K0 + tl.arange(0, max(K1, 1))
    s = tl.load(index_ptr + token * N + n, mask=n < N, other=-1)
    p = tl.zeros([BLOCK_N], tl.float32)
    for tile in tl.range(0, G * tl.cdiv(H // G, BLOCK_H), disable_licm=True):
        g, first, in_tile, has = heads_of(tile, H, G, BLOCK_H)
        h = first + in_tile
        at = (token * H + h) * K
        row = ((token // T * S + tl.maximum(s, 0)) * G + g) * K
        score = tl.dot(load_rows(q_ptr, at, has, c0, 0, K), tl.trans(load_rows(k_ptr, row, s >= 0, c0, 0, K)),
                       input_precision="ieee")
        if K1 > 0:
            score = tl.dot(load_rows(q_ptr, at, has, c1, K0, K), tl.trans(load_rows(k_ptr, row, s >= 0, c1, K0, K)),
                           score, input_precision="ieee")
        lse = tl.load(lse_ptr + local * H + h, mask=has, other=0.0)
        listed = has[:, None] & (s >= 0)[None, :]
        p += tl.sum(tl.exp2(tl.where(listed, score * scale - lse[:, None], float("-inf"))), 0)
    tl.store(p_ptr + local * N + n, p / H, mask=n < N)


@_tuned_index
@triton.jit(do_not_specialize=["start"])
def _scores(q_ptr, k_ptr, w_ptr, index_ptr, score_ptr, start, T, S, N, J, I: tl.constexpr, BLOCK_I: tl.constexpr,
            BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr):
    """score[q, n], -inf where none is listed."""
    local = tl.program_id(1).to(tl.int64)
    token = start + local
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_I)
    s = tl.load(index_ptr + token * N + n, mask=n < N, other=-1)
    k = load_rows(k_ptr, (token // T * S + tl.maximum(s, 0)) * I, s >= 0, i, 0, I)
    score = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, J, BLOCK_J):
        j = begin + tl.arange(0, BLOCK_J)
        q = load_rows(q_ptr, (token * J + j) * I, j < J, i, 0, I)
        w = tl.load(w_ptr + token * J + j, mask=j < J, other=0.0).to(tl.float32)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        score += tl.sum(w[:, None] * tl.maximum(product, 0.0), 0)
    tl.store(score_ptr + local * N + n, tl.where(s >= 0, score, float("-inf")), mask=n < N)


@_tuned_index
@triton.jit(do_not_specialize=["start"])
def _backward_queries(q_ptr, k_ptr, w_ptr, index_ptr, d_ptr, dq_ptr, dw_ptr, start, T, S, N, J, I: tl.constexpr,
                      BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq and dw of one query from the gradient d at its scores (0 where none is listed)."""
    local = tl.program_id(0).to(tl.int64)
    token = start + local
    j, i = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_I)
    at = token * J + j
    q = load_rows(q_ptr, at * I, j < J, i, 0, I)
    w = tl.load(w_ptr + at, mask=j < J, other=0.0).to(tl.float32)
    dq = tl.zeros([BLOCK_J, BLOCK_I], tl.float32)
    dw = tl.zeros([BLOCK_J], tl.float32)
    for begin in tl.range(0, N, BLOCK_N, disable_licm=True):
        n = begin + tl.arange(0, BLOCK_N)
        s = tl.load(index_ptr + token * N + n, mask=n < N, other=-1)
        k = load_rows(k_ptr, (token // T * S + tl.maximum(s, 0)) * I, s >= 0, i, 0, I)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        d = tl.load(d_ptr + local * N + n, mask=n < N, other=0.0)
        d = tl.where(product > 0, d[None, :], 0.0)
        dw += tl.sum(d * product, 1)
        dq = tl.dot((d * w[:, None]).to(k.dtype), k, dq, input_precision="ieee")
    tl.store(dq_ptr + (at * I)[:, None] + i[None, :], dq, mask=(j < J)[:, None] & (i < I)[None, :])
    tl.store(dw_ptr + at, dw, mask=j < J)


@_tuned_index
@triton.jit(do_not_specialize=["start"])
def _backward_pairs(q_ptr, k_ptr, w_ptr, index_ptr, d_ptr, pair_ptr, start, T, S, N, J, I: tl.constexpr,
                    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr):
    """The gradient of the index key at each listed place."""
    local = tl.program_id(1).to(tl.int64)
    token = start + local
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_I)
    s = tl.load(index_ptr + token * N + n, mask=n < N, other=-1)
    k = load_rows(k_ptr, (token // T * S + tl.maximum(s, 0)) * I, s >= 0, i, 0, I)
    d = tl.load(d_ptr + local * N + n, mask=n < N, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
    for begin in tl.range(0, J, BLOCK_J, disable_licm=True):
        j = begin + tl.arange(0, BLOCK_J)
        q = load_rows(q_ptr, (token * J + j) * I, j < J, i, 0, I)
        w = tl.load(w_ptr + token * J + j, mask=j < J, other=0.0).to(tl.float32)
        product = tl.dot(k, tl.trans(q), input_precision="ieee")
        dk = tl.dot(tl.where(product > 0, d[:, None] * w[None, :], 0.0).to(q.dtype), q, dk, input_precision="ieee")
    tl.store(pair_ptr + ((local * N + n) * I)[:, None] + i[None, :], dk.to(pair_ptr.dtype.element_ty),
             mask=(n < N)[:, None] & (i < I)[None, :])


def index_sizes(heads: int, dim: int) -> dict[str, int]:
    """Compile-time sizes of the kernels of the indexer."""
    return {"I": dim, "BLOCK_I": max(16, triton.next_power_of_2(dim)),
            "BLOCK_J": min(64, max(16, triton.next_power_of_2(heads))), "BLOCK_N": 64}


def main_sizes(dtype: torch.dtype, heads: int, groups: int, dim: int) -> dict[str, int]:
    """Compile-time sizes of the kernels of the main attention."""
    sizes = TileSizes.of(dtype, dim, dim, heads // groups).sizes(BLOCK_N=32)
    del sizes["V0"]
    return sizes | {"K": dim}


def distributions(index: tuple[Tensor, Tensor, Tensor], main: tuple[Tensor, Tensor], scale: float,
                  indices_BTN: Tensor, start: int, lse_QH: Tensor, score_QN: Tensor, p_QN: Tensor) -> None:
    """Index scores and main attention of the block of tokens that starts at the flattened token `start`."""
    (q, k, w), (main_q, main_k) = index, main
    queries, keys, heads, groups = q.shape[1], k.shape[1], main_q.shape[2], main_k.shape[2]
    size, listed = p_QN.shape
    sizes = main_sizes(main_q.dtype, heads, groups, main_q.shape[3])
    common = {"scale": scale * LOG2_E, "start": start, "T": queries, "S": keys, "N": listed, "H": heads,
              "G": groups} | sizes
    tiles = groups * triton.cdiv(heads // groups, sizes["BLOCK_H"])
    _log_sums[(size, tiles)](
        q_ptr=main_q, k_ptr=main_k, index_ptr=indices_BTN, lse_ptr=lse_QH, **common)
    _attention[(triton.cdiv(listed, sizes["BLOCK_N"]), size)](
        q_ptr=main_q, k_ptr=main_k, index_ptr=indices_BTN, lse_ptr=lse_QH, p_ptr=p_QN, **common)
    _scores[(triton.cdiv(listed, 64), size)](
        q_ptr=q, k_ptr=k, w_ptr=w, index_ptr=indices_BTN, score_ptr=score_QN, start=start, T=queries, S=keys, N=listed,
        J=q.shape[2], **index_sizes(*q.shape[2:]))


def add_gradients(index: tuple[Tensor, Tensor, Tensor], indices_BTN: Tensor, start: int, d_QN: Tensor,
                  dq_BTJI: Tensor, dw_BTJ: Tensor, pair_MI: Tensor, dk_SI: Tensor) -> None:
    """Writes dq and dw of a block of tokens of one row, and adds to the row's dk."""
    q, k, w = index
    queries, keys = q.shape[1], k.shape[1]
    size, listed = d_QN.shape
    sizes = index_sizes(*q.shape[2:])
    common = {"start": start, "T": queries, "S": keys, "N": listed, "J": q.shape[2]} | sizes
    _backward_queries[(size, triton.cdiv(q.shape[2], sizes["BLOCK_J"]))](
        q_ptr=q, k_ptr=k, w_ptr=w, index_ptr=indices_BTN, d_ptr=d_QN, dq_ptr=dq_BTJI, dw_ptr=dw_BTJ, **common)
    _backward_pairs[(triton.cdiv(listed, 64), size)](
        q_ptr=q, k_ptr=k, w_ptr=w, index_ptr=indices_BTN, d_ptr=d_QN, pair_ptr=pair_MI, **common)
    InverseLists(indices_BTN.flatten(0, 1)[start : start + size], keys).add(pair_MI, dk_SI)


def _compile_cases() -> list[CompileCase]:
    types = dict.fromkeys(("T", "S", "N", "start", "J", "H", "G"), "i32") | {"scale": "fp32", "index_ptr": "*i32"}
    types |= {f"{x}_ptr": "*bf16" for x in ("q", "k", "pair")}
    types |= {f"{x}_ptr": "*fp32" for x in ("w", "d", "p", "lse", "score", "dq", "dw")}
    found = [CompileCase(f"listed {name}", kernel, types, index_sizes(64, 128), ("N",))
             for name, kernel in (("scores", _scores), ("dq", _backward_queries), ("dk", _backward_pairs))]
    for label, heads, groups, dim in (("MLA 128 x 512+64", 128, 1, 576), ("GQA 16/2 x 256", 16, 2, 256),
                                      ("GQA 32/4 x 128", 32, 4, 128), ("GQA 32/4 x 64", 32, 4, 64)):
        sizes = main_sizes(torch.bfloat16, heads, groups, dim)
        head_dim = dim if dim in (64, 128) else 0
        found += [CompileCase(f"listed log sums, {label}", _log_sums, types, sizes, ("N",), head_dim=head_dim),
                  CompileCase(f"listed attention, {label}", _attention, types, sizes, ("N",), head_dim=head_dim)]
    return found


COMPILE_CASES = _compile_cases()
