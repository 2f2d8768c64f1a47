"""The indexer's loss over all visible keys as Triton kernels, a block of queries at a time.

A strip holds a number for each pair of a query of the block and a key: first the index scores and, in another, the
main attention; then the gradient at the scores.

B rows, T queries (the last T positions), S keys, J index heads, I index dim, H query heads, G key heads, K key dim (as
K0 + K1), Q queries of a block from `start` on, X keys from `low` on.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.sparse_attention.triton_backend import LOG2_E, load_rows, split_dim
from hybridlm_kernels.ops.sparse_attention.triton_index import Strips
from hybridlm_kernels.triton_support import CompileCase, tuned

KEY_GRADIENT_PROGRAMS = 4  # programs that add to the gradient of one tile of keys
_TILES = [triton.Config({"BLOCK_T": 64, "BLOCK_S": 32}, num_warps=8, num_stages=1),
          triton.Config({"BLOCK_T": 64, "BLOCK_S": 64}, num_warps=4, num_stages=3),
          triton.Config({"BLOCK_T": 64, "BLOCK_S": 128}, num_warps=8, num_stages=3),
          triton.Config({"BLOCK_T": 128, "BLOCK_S": 128}, num_warps=8, num_stages=2)]


@tuned(_TILES, key=["H", "G", "K"])
@triton.jit(do_not_specialize=["Q", "start"])
def _log_sums(q_ptr, k_ptr, first_ptr, lse_ptr, scale, T, S, Q, start, H, G, K: tl.constexpr, K0: tl.constexpr,
              K1: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """lse[b, t - start, h]: log2 of the sum of exp2 over the visible keys. `scale` includes log2 e."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c0, c1 = tl.arange(0, K0), K0 + tl.arange(0, max(K1, 1))
    token = b * T + start + row.to(tl.int64)
    first = tl.load(first_ptr + token, mask=row < Q, other=S)
    last = S - T + start + tl.minimum(row, Q - 1)
    at = (token * H + h) * K
    q0 = load_rows(q_ptr, at, row < Q, c0, 0, K)
    if K1 > 0:
        q1 = load_rows(q_ptr, at, row < Q, c1, K0, K)
    keys = k_ptr + (b * S * G + h // (H // G)) * K
    most = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for begin in tl.range(tl.min(first), tl.max(last) + 1, BLOCK_S, disable_licm=True):
        s = begin + tl.arange(0, BLOCK_S)
        at_key = s.to(tl.int64) * (G * K)
        score = tl.dot(q0, tl.trans(load_rows(keys, at_key, s < S, c0, 0, K)), input_precision="ieee")
        if K1 > 0:
            score = tl.dot(q1, tl.trans(load_rows(keys, at_key, s < S, c1, K0, K)), score, input_precision="ieee")
        seen = (s[None, :] >= first[:, None]) & (s[None, :] <= last[:, None])
        score = tl.where(seen, score * scale, float("-inf"))
        above = tl.maximum(most, tl.max(score, 1))
        pivot = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(most - pivot) + tl.sum(tl.exp2(score - pivot[:, None]), 1)
        most = above
    tl.store(lse_ptr + (b * Q + row) * H + h, most + tl.log2(tl.where(row < Q, total, 1.0)), mask=row < Q)


@tuned(_TILES[:-1], key=["H", "G", "K"])  # the largest spills
@triton.jit(do_not_specialize=["Q", "start", "low"])
def _attention(q_ptr, k_ptr, first_ptr, lse_ptr, p_ptr, scale, T, S, Q, start, low, stride, H, G, K: tl.constexpr,
               K0: tl.constexpr, K1: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """p[b, t - start, s - low]: the mean over heads of softmax, 0 where a key is not visible."""
    b = tl.program_id(2).to(tl.int64)
    begin_t, begin_s = tl.program_id(1) * BLOCK_T, low + tl.program_id(0) * BLOCK_S
    if begin_s > S - T + start + tl.minimum(begin_t + BLOCK_T, Q) - 1:
        return
    if begin_s + BLOCK_S <= tl.load(first_ptr + b * T + start + begin_t):
        return
    row, s = begin_t + tl.arange(0, BLOCK_T), begin_s + tl.arange(0, BLOCK_S)
    c0, c1 = tl.arange(0, K0), K0 + tl.arange(0, max(K1, 1))
    token = b * T + start + row.to(tl.int64)
    first = tl.load(first_ptr + token, mask=row < Q, other=S)
    seen = (s[None, :] >= first[:, None]) & (s[None, :] <= (S - T + start + row)[:, None])
    p = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for h in tl.range(0, H, disable_licm=True):
        at, at_key = (token * H + h) * K, ((b * S + s) * G + h // (H // G)) * K
        score = tl.dot(load_rows(q_ptr, at, row < Q, c0, 0, K), tl.trans(load_rows(k_ptr, at_key, s < S, c0, 0, K)),
                       input_precision="ieee")
        if K1 > 0:
            score = tl.dot(load_rows(q_ptr, at, row < Q, c1, K0, K),
                           tl.trans(load_rows(k_ptr, at_key, s < S, c1, K0, K)), score, input_precision="ieee")
        lse = tl.load(lse_ptr + (b * Q + row) * H + h, mask=row < Q, other=0.0)
        p += tl.exp2(tl.where(seen, score * scale - lse[:, None], float("-inf")))
    tl.store(p_ptr + (b * Q + row)[:, None] * stride + (s - low)[None, :], p / H,
             mask=(row < Q)[:, None] & (s < S)[None, :])


@tuned([triton.Config({"BLOCK_R": 64, "BLOCK_S": 64}, num_warps=8, num_stages=1),
        triton.Config({"BLOCK_R": 128, "BLOCK_S": 64}, num_warps=8, num_stages=3)], key=["J", "I"])
@triton.jit(do_not_specialize=["Q", "start", "low"])
def _backward_queries(q_ptr, k_ptr, w_ptr, first_ptr, d_ptr, dq_ptr, dw_ptr, T, S, Q, start, low, stride, J,
                      I: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """dq and dw from the gradient d at the scores. Rows are pairs of a query and a head."""
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_I)
    inside = r < Q * J
    t = r // J
    first = tl.load(first_ptr + b * T + start + t, mask=inside, other=S)
    last = S - T + start + tl.minimum(t, Q - 1)
    at = (b * T + start) * J + r
    q = load_rows(q_ptr, at * I, inside, i, 0, I)
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dq = tl.zeros([BLOCK_R, BLOCK_I], tl.float32)
    dw = tl.zeros([BLOCK_R], tl.float32)
    line = d_ptr + (b * Q + t) * stride - low
    for begin in tl.range(tl.min(first), tl.max(last) + 1, BLOCK_S, disable_licm=True):
        s = begin + tl.arange(0, BLOCK_S)
        k = load_rows(k_ptr, (b * S + s) * I, s < S, i, 0, I)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = (s[None, :] >= first[:, None]) & (s[None, :] <= last[:, None])
        d = tl.load(line[:, None] + s[None, :], mask=seen, other=0.0)
        d = tl.where(product > 0, d, 0.0)
        dw += tl.sum(d * product, 1)
        dq = tl.dot((d * w[:, None]).to(k.dtype), k, dq, input_precision="ieee")
    tl.store(dq_ptr + (at * I)[:, None] + i[None, :], dq, mask=inside[:, None] & (i < I)[None, :])
    tl.store(dw_ptr + at, dw, mask=inside)


@triton.jit(do_not_specialize=["Q", "start", "low"])
def _backward_keys(q_ptr, k_ptr, w_ptr, first_ptr, d_ptr, dk_ptr, B, T, S, Q, start, low, stride, J, I: tl.constexpr,
                   PARTS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """dk[part, b, s] += the gradient from every PARTS-th tile of rows (pairs of a query and a head)."""
    b, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    s = low + tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    i = tl.arange(0, BLOCK_I)
    k = load_rows(k_ptr, (b * S + s) * I, s < S, i, 0, I)
    dk = tl.zeros([BLOCK_S, BLOCK_I], tl.float32)
    earliest = tl.maximum(tl.min(s) - (S - T) - start, 0) * J // BLOCK_R  # the tile of the first query that sees a key
    for tile in tl.range(earliest // PARTS * PARTS + part, tl.cdiv(Q * J, BLOCK_R), PARTS, disable_licm=True):
        r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        inside, t = r < Q * J, r // J
        first = tl.load(first_ptr + b * T + start + t, mask=inside, other=S)
        at = (b * T + start) * J + r
        q = load_rows(q_ptr, at * I, inside, i, 0, I)
        w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
        product = tl.dot(k, tl.trans(q), input_precision="ieee")
        seen = (s[:, None] >= first[None, :]) & (s[:, None] <= (S - T + start + t)[None, :]) & inside[None, :]
        d = tl.load(d_ptr + ((b * Q + t) * stride)[None, :] + (s - low)[:, None], mask=seen, other=0.0)
        d = tl.where(product > 0, d * w[None, :], 0.0).to(q.dtype)
        dk = tl.dot(d, q, dk, input_precision="ieee")
    to = dk_ptr + (((part.to(tl.int64) * B + b) * S + s) * I)[:, None] + i[None, :]
    mask = (s < S)[:, None] & (i < I)[None, :]
    tl.store(to, tl.load(to, mask=mask, other=0.0) + dk, mask=mask)


def attention_strip(q_BTHK: Tensor, k_BSGK: Tensor, scale: float, strips: Strips, start: int, low: int,
                    lse_BQH: Tensor, p_BQX: Tensor) -> None:
    """The main attention of a block of queries, averaged over heads; other pairs are left undefined."""
    batch, queries, heads, dim = q_BTHK.shape
    keys, groups, size, width = k_BSGK.shape[1], k_BSGK.shape[2], p_BQX.shape[1], p_BQX.shape[2]
    K0, K1 = split_dim(dim)
    sizes = {"K": dim, "K0": K0, "K1": K1}
    _log_sums[lambda meta: (triton.cdiv(size, meta["BLOCK_T"]), heads, batch)](
        q_ptr=q_BTHK, k_ptr=k_BSGK, first_ptr=strips.first_BT, lse_ptr=lse_BQH, scale=scale * LOG2_E, T=queries, S=keys,
        Q=size, start=start, H=heads, G=groups, **sizes)
    _attention[lambda meta: (triton.cdiv(width, meta["BLOCK_S"]), triton.cdiv(size, meta["BLOCK_T"]), batch)](
        q_ptr=q_BTHK, k_ptr=k_BSGK, first_ptr=strips.first_BT, lse_ptr=lse_BQH, p_ptr=p_BQX, scale=scale * LOG2_E,
        T=queries, S=keys, Q=size, start=start, low=low, stride=p_BQX.stride(1), H=heads, G=groups, **sizes)


def add_gradients(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, strips: Strips, start: int, low: int, d_BQX: Tensor,
                  dq_BTJI: Tensor, dw_BTJ: Tensor, dk_PBSI: Tensor) -> None:
    """Writes dq and dw of a block of queries, adds to dk."""
    batch, queries, heads, dim = q_BTJI.shape
    keys, size, width, block = k_BSI.shape[1], d_BQX.shape[1], d_BQX.shape[2], max(16, triton.next_power_of_2(dim))
    common = {"T": queries, "S": keys, "Q": size, "start": start, "low": low, "stride": d_BQX.stride(1), "J": heads,
              "I": dim, "BLOCK_I": block}
    _backward_queries[lambda meta: (triton.cdiv(size * heads, meta["BLOCK_R"]), batch)](
        q_ptr=q_BTJI, k_ptr=k_BSI, w_ptr=w_BTJ, first_ptr=strips.first_BT, d_ptr=d_BQX, dq_ptr=dq_BTJI, dw_ptr=dw_BTJ,
        **common)
    _backward_keys[(triton.cdiv(width, 64), KEY_GRADIENT_PROGRAMS, batch)](
        q_ptr=q_BTJI, k_ptr=k_BSI, w_ptr=w_BTJ, first_ptr=strips.first_BT, d_ptr=d_BQX, dk_ptr=dk_PBSI, B=batch,
        PARTS=KEY_GRADIENT_PROGRAMS, BLOCK_R=64, BLOCK_S=64, num_warps=4, num_stages=2, **common)


def _compile_cases() -> list[CompileCase]:
    types = dict.fromkeys(("B", "T", "S", "Q", "start", "low", "stride", "J", "H", "G"), "i32") | {"scale": "fp32"}
    types |= {f"{x}_ptr": "*bf16" for x in ("q", "k")} | {"first_ptr": "*i32"}
    types |= {f"{x}_ptr": "*fp32" for x in ("w", "d", "p", "lse", "dq", "dw", "dk")}
    index = {"I": 128, "BLOCK_I": 128}
    found = [CompileCase("index dq", _backward_queries, types, index, ("stride",)),
             CompileCase("index dk", _backward_keys, types,
                         index | {"PARTS": KEY_GRADIENT_PROGRAMS, "BLOCK_R": 64, "BLOCK_S": 64}, ("stride",))]
    for label, dim in (("MLA absorbed 512+64", 576), ("MLA 128+64", 192), ("GQA 256", 256), ("GQA 128", 128),
                       ("GQA 64", 64)):
        K0, K1 = split_dim(dim)
        sizes = {"K": dim, "K0": K0, "K1": K1}
        head_dim = dim if dim in (64, 128) else 0
        found += [CompileCase(f"log sums, {label}", _log_sums, types, sizes, head_dim=head_dim),
                  CompileCase(f"attention, {label}", _attention, types, sizes, ("stride",), head_dim=head_dim)]
    return found


COMPILE_CASES = _compile_cases()
