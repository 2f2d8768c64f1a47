"""Kernels of a decay per channel: the inputs of the scans, and the gradients of q, k and g.

Both run one program per chunk and value head (and, for the gradients, block of channels).

With a_t = e^g_t:  A_ij = scale q_i . (a_{j+1} ... a_i) k_j for i >= j;  queries_i = scale q_i a_1 ... a_i;
writes_j = k_j a_{j+1} ... a_C.  Pairs i > j are taken by levels (`triton_tiles.py`), so no exponent is positive,
whatever the gate.

Legend: H key heads, HV value heads, K/V key/value head dim, C tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_tiles import (
    LEVELS,
    C,
    gate_gradients,
    gate_rate,
    lies_between,
    load_gates,
    load_tile,
    log2_decay,
    pairs_of,
    store_tile,
    sum_over,
)
from hybridlm_kernels.triton_support import tuned

CONFIGS = [triton.Config({}, num_warps=warps, num_stages=1) for warps in (8, 4)]


@triton.jit
def _gates(g_ptr, A_log_ptr, bias_ptr, gate_constant, rows, inside, channels, head, HV, K: tl.constexpr,
           GATE: tl.constexpr):
    """Load the raw gates [C, channels], e^A_log and dt_bias [1, channels], and find the log2 decays, 0 outside."""
    u, bias = load_gates(g_ptr + head * K, None if bias_ptr is None else bias_ptr + head * K, rows, HV * K, channels, K,
                         inside)
    rate = gate_rate(A_log_ptr, head)
    return u, rate, bias, log2_decay(u, rate, bias, gate_constant, inside, GATE)


@tuned(CONFIGS[:1], ["K", "EXACT"])  # with 4 warps it spills
@triton.jit
def chunk_kernel(q_ptr, k_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant, chunks_ptr, A_ptr, total_ptr, queries_ptr,
                 writes_ptr, scale, H, HV, K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
                 SCORES: tl.constexpr, EXACT: tl.constexpr):
    """Write queries, writes [tokens, HV, K] and, with SCORES, A [tokens, HV, C] and the decays of chunks [P, HV, K]."""
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, filled = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    t = tl.arange(0, C)
    rows, inside = first + t, t < filled
    i, j = t[:, None], t[None, :]
    key_head = head // (HV // H)
    A, itself = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for k0 in range(0, K, BK):
        channels = k0 + tl.arange(0, BK)
        q = load_tile(q_ptr + key_head * K, rows, H * K, channels, K, inside)
        k = load_tile(k_ptr + key_head * K, rows, H * K, channels, K, inside)
        _, _, _, g = _gates(g_ptr, A_log_ptr, bias_ptr, gate_constant, rows, inside, channels, head, HV, K, GATE)
        prefix, suffix = tl.exp2(sum_over(j <= i, g, EXACT)), tl.exp2(sum_over(j > i, g, EXACT))
        store_tile(queries_ptr + head * K, rows, HV * K, channels, K, inside, q * prefix * scale)
        store_tile(writes_ptr + head * K, rows, HV * K, channels, K, inside, k * suffix)
        if SCORES:
            tl.store(total_ptr + (chunk * HV + head) * K + channels, tl.exp2(tl.sum(g, axis=0)), mask=channels < K)
            itself += tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)
            for e in range(LEVELS):
                b = 1 << e
                factor = tl.exp2(sum_over(lies_between(i, j, b), g, EXACT))
                pairs = tl.dot((q * factor).to(q.dtype), tl.trans((k * factor).to(k.dtype)), input_precision=PRECISION)
                A += tl.where(pairs_of(i, j, b), pairs, 0.0)
    if SCORES:
        store_tile(A_ptr + head * C, rows, HV * C, t, C, inside, scale * tl.where(i == j, itself[:, None], A))


@triton.jit
def _pair_gradients(x, y, g, M, dx, dg, ABOVE: tl.constexpr, EXACT: tl.constexpr):
    """Add the terms of pairs of tokens to dx and dg [C, channels].

    x are the queries and y the keys, or with ABOVE the other way round; M holds the gradients of their scores, x in
    rows.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    t = tl.arange(0, C)
    i, j = t[:, None], t[None, :]
    for e in tl.range(0, LEVELS, num_stages=1, disable_licm=True):
        b = 1 << e
        factor = tl.exp2(sum_over(lies_between(i, j, b), g, EXACT))
        pairs = pairs_of(j, i, b) if ABOVE else pairs_of(i, j, b)
        dxf = factor * tl.dot(tl.where(pairs, M, 0.0), (y * factor).to(y.dtype), input_precision=PRECISION)
        dx += dxf
        dg += sum_over(lies_between(j, i, b), x * dxf, EXACT)
    return dx, dg


@triton.jit
def _products(x_ptr, y_ptr, S_ptr, rows, stride, inside, channels, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
              BV: tl.constexpr, PRECISION: tl.constexpr):
    """The products x y^T [C, C] and x S^T [C, channels]."""
    xy, xS = tl.zeros([C, C], tl.float32), tl.zeros([C, BK], tl.float32)
    for v0 in tl.range(0, V, BV, num_stages=1, disable_licm=True):
        columns = v0 + tl.arange(0, BV)
        x = load_tile(x_ptr, rows, stride, columns, V, inside)
        xy = tl.dot(x, tl.trans(load_tile(y_ptr, rows, stride, columns, V, inside)), xy, input_precision=PRECISION)
        xS = tl.dot(x, tl.trans(load_tile(S_ptr, channels, V, columns, V, channels < K)), xS, input_precision=PRECISION)
    return xy, xS


@tuned(CONFIGS[::-1], ["K", "V", "KEYS", "EXACT"])  # with 8 warps it spills at heads of 32
@triton.jit
def gradients_kernel(x_ptr, y_ptr, left_ptr, right_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant, S_ptr, other_S_ptr,
                     total_ptr, chunks_ptr, dx_ptr, sum_ptr, dg_ptr, d_A_log_ptr, d_bias_ptr, scale, H, HV,
                     K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
                     KEYS: tl.constexpr, EXACT: tl.constexpr):
    """Write dq [tokens, HV, K] from x, y, left, right, S = q, k, do, v and the states before chunks; with KEYS write dk
    from k, q, v, do and the gradients of the states after chunks [P, HV, K, V].

    These are two launches, because both in one spill registers. Where gates learn, the first launch writes its terms of
    the gradient of decays, sum [tokens, HV, K], and the second the complete dg, d_A_log [P, HV, K / BK] per chunk and
    block of channels, and d_bias [P, HV, K] per chunk.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    chunk, pid = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k_block, head = pid % K_BLOCKS, pid // K_BLOCKS
    first, filled = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    t, channels = tl.arange(0, C), k_block * BK + tl.arange(0, BK)
    rows, inside, here = first + t, t < filled, chunk * HV + head
    i, j = t[:, None], t[None, :]
    at_state, of_channels, key_head = here * K * V, channels < K, head // (HV // H)
    x = load_tile(x_ptr + key_head * K, rows, H * K, channels, K, inside)
    y = load_tile(y_ptr + key_head * K, rows, H * K, channels, K, inside)
    u, rate, bias, g = _gates(g_ptr, A_log_ptr, bias_ptr, gate_constant, rows, inside, channels, head, HV, K, GATE)
    M, dx = _products(left_ptr + head * V, right_ptr + head * V, S_ptr + at_state, rows, HV * V, inside, channels, K, V,
                      BK, BV, PRECISION)
    itself = scale * tl.sum(tl.where(i == j, M, 0.0), axis=1)
    if KEYS:
        dx *= tl.exp2(sum_over(j > i, g, EXACT))
        dg = sum_over(j < i, x * dx, EXACT)
    else:
        dx *= tl.exp2(sum_over(j <= i, g, EXACT)) * scale
        dg = sum_over(j >= i, x * dx, EXACT)
    dx, dg = _pair_gradients(x, y, g, (M * scale).to(x.dtype), dx, dg, KEYS, EXACT)
    store_tile(dx_ptr + head * K, rows, HV * K, channels, K, inside, dx + itself[:, None] * y)
    if sum_ptr is not None:
        if not KEYS:
            store_tile(sum_ptr + head * K, rows, HV * K, channels, K, inside, dg)
        else:
            d_total = tl.zeros([BK], tl.float32)
            for v0 in range(0, V, BV):
                columns = v0 + tl.arange(0, BV)
                S = load_tile(S_ptr + at_state, channels, V, columns, V, of_channels).to(tl.float32)
                d_total += tl.sum(S * load_tile(other_S_ptr + at_state, channels, V, columns, V, of_channels), axis=1)
            d_total *= tl.load(total_ptr + here * K + channels, mask=of_channels, other=0.0)
            dg += d_total[None, :] + load_tile(sum_ptr + head * K, rows, HV * K, channels, K, inside)
            du, dA = gate_gradients(u, dg, rate, bias, gate_constant, GATE)
            du = tl.where(inside[:, None], du, 0.0)
            store_tile(dg_ptr + head * K, rows, HV * K, channels, K, inside, du)
            if d_A_log_ptr is not None:
                in_both = inside[:, None] & of_channels[None, :]
                tl.store(d_A_log_ptr + here * K_BLOCKS + k_block, tl.sum(tl.where(in_both, dA, 0.0)))
            if d_bias_ptr is not None:
                tl.store(d_bias_ptr + here * K + channels, tl.sum(du, axis=0), mask=of_channels)
