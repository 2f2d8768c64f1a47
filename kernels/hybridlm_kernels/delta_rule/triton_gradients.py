"""Gradients of the inputs, one program a chunk and value head: what is left when the scans are done.

With S the state at the start of a chunk, dS' the gradient of that after it, D_ij = a_{j+1} ... a_i, B = diag(beta):
    dA_ij = dO_i . Y_j beta_j,  dL_ij = -beta_i Z_i . Y_j beta_j,  dbeta_i = Z_i . Y_i,  dV = B Z
and q, k, g get theirs from A, L, and from the decayed queries, keys and writes. A gate t is part of the pair (i, j)
when j < t <= i. With a decay a channel the gradient of a sum of decays goes to the gates it is made of, level by level.

A program writes the gradients of the scores to `scratch` and reads them back as operands, either way round: they do
not fill its registers, and no product takes the transposed result of another (which Triton before 3.7.1 compiles
wrongly on Hopper).

Legend: H key heads, G value heads, K/V key/value head dim, C tokens a chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_support import tuned
from .triton_chunk import BETA, DECAY_LOG2, FACTORS, KEY, KEY_NORM, QUERY, QUERY_NORM, WRITE
from .triton_tiles import (
    LEVELS,
    LOG2_E,
    LOWEST,
    C,
    after_middle,
    before_middle,
    decay_between,
    gate_gradients,
    gate_value,
    load_tile,
    pairs_of,
    span,
    store_tile,
    sum_over,
)


@triton.jit
def _products(a_ptr, b_ptr, rows, inside, b_rows, b_inside, stride, D: tl.constexpr, BD: tl.constexpr,
              BLOCK: tl.constexpr, P: tl.constexpr):
    """The products of rows of a and b, [C, BLOCK]."""
    products = tl.zeros([C, BLOCK], tl.float32)
    for d0 in range(0, D, BD):
        columns = d0 + tl.arange(0, BD)
        a = load_tile(a_ptr, rows, stride, columns, D, inside)
        b = load_tile(b_ptr, b_rows, stride, columns, D, b_inside)
        products = tl.dot(a, tl.trans(b), products, input_precision=P)
    return products


@triton.jit
def _value_gradients(do_ptr, y_ptr, z_ptr, dv_ptr, rows, stride, inside, beta, V: tl.constexpr, BV: tl.constexpr):
    """The row sums of dO Y and Z Y. Writes dV = B Z."""
    same, d_beta = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        do = load_tile(do_ptr, rows, stride, columns, V, inside).to(tl.float32)
        y = load_tile(y_ptr, rows, stride, columns, V, inside).to(tl.float32)
        z = load_tile(z_ptr, rows, stride, columns, V, inside).to(tl.float32)
        same += tl.sum(do * y, axis=1)
        d_beta += tl.sum(z * y, axis=1)
        store_tile(dv_ptr, rows, stride, columns, V, inside, beta[:, None] * z)
    return same, d_beta


@triton.jit
def _score_gradients(do_ptr, y_ptr, z_ptr, k_ptr, A_ptr, MA_ptr, ML_ptr, factors_ptr, first, filled, tokens, H, G,
                     K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
                     EXACT: tl.constexpr):
    """Writes MA, the gradients of the queries' scores below the diagonal, and ML, those of the keys' scores below it
    and mirrored above, both with all factors of the products of q and k. With a decay a head returns what the pairs
    give to the gates, some columns of the scores at a time."""
    P: tl.constexpr = "ieee" if EXACT else "tf32"
    BLOCK: tl.constexpr = 32
    t = tl.arange(0, C)
    rows, inside, i = first + t, t < filled, t[:, None]
    per_row = factors_ptr + rows
    query_norm = tl.load(per_row + QUERY_NORM * tokens, mask=inside, other=0.0)
    written = tl.load(per_row + KEY_NORM * tokens, mask=inside, other=0.0)
    written *= tl.load(per_row + BETA * tokens, mask=inside, other=0.0)
    dg = tl.zeros([C], tl.float32)
    for j0 in range(0, C, BLOCK):
        at = j0 + tl.arange(0, BLOCK)
        columns, in_columns, j = first + at, at < filled, at[None, :]
        per_column = factors_ptr + columns
        beta = tl.load(per_column + BETA * tokens, mask=in_columns, other=0.0)[None, :]
        by_column = beta * tl.load(per_column + KEY_NORM * tokens, mask=in_columns, other=0.0)[None, :]
        MA = _products(do_ptr, y_ptr, rows, inside, columns, in_columns, G * V, V, BV, BLOCK, P)
        ML = _products(z_ptr, y_ptr, rows, inside, columns, in_columns, G * V, V, BV, BLOCK, P)
        MA = tl.where(i > j, MA, 0.0)
        ML = tl.where(i > j, ML, 0.0)
        if DECAY == "head":
            pairs = MA * beta * load_tile(A_ptr, rows, G * C, at, C, inside)
            g = tl.load(per_row + DECAY_LOG2 * tokens, mask=inside, other=0.0)
            D = decay_between(g, j, EXACT)
            MA *= D
            ML *= D
        MA *= query_norm[:, None] * by_column
        ML *= -written[:, None] * by_column
        store_tile(MA_ptr, rows, G * C, at, C, inside, MA)
        half = ML.to(ML_ptr.dtype.element_ty)
        tl.store(ML_ptr + rows[:, None] * (G * C) + j, half, mask=inside[:, None] & (i >= j))
        tl.store(ML_ptr + columns[:, None] * (G * C) + t[None, :], tl.trans(half),
                 mask=in_columns[:, None] & (t[None, :] > at[:, None]))
        if DECAY == "head":
            pairs += ML * _products(k_ptr, k_ptr, rows, inside, columns, in_columns, H * K, K, BK, BLOCK, P)
            from_rows = tl.sum(tl.where(i >= t[None, :], tl.sum(pairs, axis=1)[:, None], 0.0), axis=0)
            dg += from_rows - tl.sum(tl.where(j >= i, tl.sum(pairs, axis=0)[None, :], 0.0), axis=1)
    return dg


@triton.jit
def _state_gradients(do_ptr, y_ptr, z_ptr, S_ptr, dS_ptr, rows, stride, inside, channels, K: tl.constexpr,
                     V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, P: tl.constexpr):
    """dO S^T, -Z S^T, Y dS'^T of some channels, and the row sums of S dS'."""
    d_queries, d_keys = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    d_writes, d_total = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
    real = channels < K
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        S = load_tile(S_ptr, channels, V, columns, V, real)
        dS = load_tile(dS_ptr, channels, V, columns, V, real)
        d_total += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
        do = load_tile(do_ptr, rows, stride, columns, V, inside)
        d_queries = tl.dot(do, tl.trans(S), d_queries, input_precision=P)
        z = load_tile(z_ptr, rows, stride, columns, V, inside)
        d_keys = tl.dot(z, tl.trans(S), d_keys, input_precision=P)
        y = load_tile(y_ptr, rows, stride, columns, V, inside)
        d_writes = tl.dot(y, tl.trans(dS), d_writes, input_precision=P)
    return d_queries, -d_keys, d_writes, d_total


@triton.jit
def _channel_pairs(q, k, g, MA_ptr, ML_ptr, rows, stride, inside, dq, dk, dg, FAST: tl.constexpr,
                   EXACT: tl.constexpr):
    """Adds what pairs of tokens give to dq, dk and dg [C, channels]. MA holds the gradient of the queries' scores
    below the diagonal, ML that of the keys' scores below it and mirrored above."""
    P: tl.constexpr = "ieee" if EXACT else "tf32"
    LOWEST_LEVEL: tl.constexpr = 4 if FAST else 0
    t = tl.arange(0, C)
    i, j = t[:, None], t[None, :]
    for e in range(LOWEST_LEVEL, LEVELS):
        b = 1 << e
        factor = tl.exp2(sum_over(span(i, j, b), g, EXACT))
        qf, kf = (q * factor).to(q.dtype), (k * factor).to(k.dtype)
        MA = tl.where(pairs_of(i, j, b), load_tile(MA_ptr, rows, stride, t, C, inside), 0.0).to(q.dtype)
        both = pairs_of(i, j, b) | pairs_of(j, i, b)
        ML = tl.where(both, load_tile(ML_ptr, rows, stride, t, C, inside), 0.0).to(q.dtype)
        dqf = factor * tl.dot(MA, kf, input_precision=P)
        dkf = tl.dot(tl.trans(MA), qf, input_precision=P)
        dkf = factor * tl.dot(ML, kf, dkf, input_precision=P)
        dq += dqf
        dk += dkf
        dg += sum_over(span(j, i, b), q * dqf + k * dkf, EXACT)
    if FAST:
        exponent = sum_over(after_middle(i, j), g, EXACT) - sum_over(before_middle(i, j), g, EXACT)
        of_rows, of_columns = tl.exp2(exponent), tl.exp2(-exponent)
        q_rows, k_rows = (q * of_rows).to(q.dtype), (k * of_rows).to(k.dtype)
        k_columns = (k * of_columns).to(k.dtype)
        below = (i // 16 == j // 16) & (i > j)
        MA = tl.where(below, load_tile(MA_ptr, rows, stride, t, C, inside), 0.0).to(q.dtype)
        ML = tl.where(below, load_tile(ML_ptr, rows, stride, t, C, inside), 0.0).to(q.dtype)
        dq_rows = of_rows * tl.dot(MA, k_columns, input_precision=P)
        dk_rows = of_rows * tl.dot(ML, k_columns, input_precision=P)
        dk_columns = tl.dot(tl.trans(MA), q_rows, input_precision=P)
        dk_columns = of_columns * tl.dot(tl.trans(ML), k_rows, dk_columns, input_precision=P)
        dq += dq_rows
        dk += dk_rows + dk_columns
        d_exponent = q * dq_rows + k * (dk_rows - dk_columns)
        dg += sum_over(after_middle(j, i), d_exponent, EXACT) - sum_over(before_middle(j, i), d_exponent, EXACT)
    return dq, dk, dg


@triton.jit
def _take_from_norm(x_ptr, dx_ptr, rows, x_stride, dx_stride, inside, weight, K: tl.constexpr, BK: tl.constexpr):
    """dx -= weight x: the part of a gradient along x, which the l2 norm takes out."""
    for k0 in range(0, K, BK):
        columns = k0 + tl.arange(0, BK)
        x = load_tile(x_ptr, rows, x_stride, columns, K, inside).to(tl.float32)
        dx = load_tile(dx_ptr, rows, dx_stride, columns, K, inside).to(tl.float32)
        store_tile(dx_ptr, rows, dx_stride, columns, K, inside, dx - weight[:, None] * x)


CONFIGS = [triton.Config({"BK": channels, "BV": values}, num_warps=warps, num_stages=stages)
           for channels, values, warps, stages in ((16, 32, 4, 1), (32, 32, 4, 1), (32, 64, 4, 2), (64, 64, 8, 1))]


@tuned(CONFIGS, ["K", "V", "DECAY", "FAST", "EXACT"])
@triton.jit
def gradients_kernel(q_ptr, k_ptr, g_ptr, A_log_ptr, bias_ptr, do_ptr, y_ptr, z_ptr, A_ptr, factors_ptr, total_ptr,
                     S_ptr, dS_ptr, chunks_ptr, scratch_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, d_beta_ptr, d_A_log_ptr,
                     d_bias_ptr, inverse_scale, gate_constant, beta_scale, tokens, H, G, K: tl.constexpr,
                     V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
                     FAST: tl.constexpr, L2NORM: tl.constexpr, SIGMOID: tl.constexpr, EXACT: tl.constexpr):
    """dq, dk [tokens, G, K], dv [tokens, G, V], dg as g, d_beta [tokens, G], and by chunk d_A_log [P, G] and d_bias
    [P, G(, K)]. `scratch` is [2, tokens, G, C]."""
    P: tl.constexpr = "ieee" if EXACT else "tf32"
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, filled = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    t = tl.arange(0, C)
    rows, inside = first + t, t < filled
    i, j = t[:, None], t[None, :]
    here = chunk * G + head
    q_ptr += head // (G // H) * K
    k_ptr += head // (G // H) * K
    dq_ptr += head * K
    dk_ptr += head * K
    do_ptr += head * V
    y_ptr += head * V
    z_ptr += head * V
    factors_ptr += head * FACTORS * tokens
    beta = tl.load(factors_ptr + BETA * tokens + rows, mask=inside, other=0.0)
    query_norm = tl.load(factors_ptr + QUERY_NORM * tokens + rows, mask=inside, other=0.0)
    key_norm = tl.load(factors_ptr + KEY_NORM * tokens + rows, mask=inside, other=0.0)

    MA_ptr = scratch_ptr + head * C
    ML_ptr = MA_ptr + (chunk - chunk + G) * tokens * C
    same, d_beta = _value_gradients(do_ptr, y_ptr, z_ptr, dv_ptr + head * V, rows, G * V, inside, beta, V, BV)
    if d_beta_ptr is not None:
        if SIGMOID:
            d_beta *= beta * (1.0 - beta / beta_scale)
        tl.store(d_beta_ptr + rows * G + head, d_beta.to(d_beta_ptr.dtype.element_ty), mask=inside)
    same *= query_norm * beta * key_norm
    dg_pairs = _score_gradients(do_ptr, y_ptr, z_ptr, k_ptr, A_ptr + head * C, MA_ptr, ML_ptr, factors_ptr, first,
                                filled, tokens, H, G, K, V, BK, BV, DECAY, EXACT)
    tl.debug_barrier()  # what other threads of the program wrote is read from here on
    rate = 1.0
    if A_log_ptr is not None:
        rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    if DECAY == "channel":
        of_queries, of_keys, of_writes = query_norm, beta * key_norm, beta * key_norm
    else:
        of_queries = tl.load(factors_ptr + QUERY * tokens + rows, mask=inside, other=0.0)
        of_keys = beta * tl.load(factors_ptr + KEY * tokens + rows, mask=inside, other=0.0)
        of_writes = beta * tl.load(factors_ptr + WRITE * tokens + rows, mask=inside, other=0.0)
    dg_rows, dg_columns = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    d_total_sum, d_A_log = 0.0, 0.0
    along_q, along_k = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for k0 in tl.range(0, K, BK, disable_licm=True):  # masks of [C, C] would fill the registers
        channels = k0 + tl.arange(0, BK)
        at_state = here * K * V
        d_queries, d_keys, d_writes, d_total = _state_gradients(
            do_ptr, y_ptr, z_ptr, S_ptr + at_state, dS_ptr + at_state, rows, G * V, inside, channels, K, V, BK, BV, P)
        q = load_tile(q_ptr, rows, H * K, channels, K, inside)
        k = load_tile(k_ptr, rows, H * K, channels, K, inside)
        dq = d_queries * of_queries[:, None]
        dk = d_keys * of_keys[:, None]
        d_writes *= of_writes[:, None]
        if DECAY == "channel":
            u = load_tile(g_ptr + head * K, rows, G * K, channels, K, inside)
            bias = tl.zeros([BK], tl.float32)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + head * K + channels, mask=channels < K, other=0.0).to(tl.float32)
            g = gate_value(u, rate, bias[None, :], gate_constant, GATE) * LOG2_E
            g = tl.where(inside[:, None], tl.where(g < LOWEST, LOWEST, g), 0.0)
            prefix = tl.exp2(sum_over(j <= i, g, EXACT))
            dq *= prefix
            dk *= prefix
            d_writes *= tl.exp2(sum_over(j > i, g, EXACT))
            total = tl.load(total_ptr + here * K + channels, mask=channels < K, other=0.0)
            dg = sum_over(j >= i, q * dq + k * dk, EXACT) + sum_over(j < i, k * d_writes, EXACT)
            dg += (d_total * total)[None, :]
            dk += d_writes
            dq, dk, dg = _channel_pairs(q, k, g, MA_ptr, ML_ptr, rows, G * C, inside, dq, dk, dg, FAST, EXACT)
            if dg_ptr is not None:
                dg, dA = gate_gradients(u, dg, rate, bias[None, :], gate_constant, GATE)
                dg = tl.where(inside[:, None], dg, 0.0)
                d_A_log += tl.sum(tl.where(inside[:, None], dA, 0.0))
                store_tile(dg_ptr + head * K, rows, G * K, channels, K, inside, dg)
                if d_bias_ptr is not None:
                    tl.store(d_bias_ptr + here * K + channels, tl.sum(dg, axis=0), mask=channels < K)
        else:
            if DECAY == "head":
                dg_rows += tl.sum(q * dq + k * dk, axis=1)
                dg_columns += tl.sum(k * d_writes, axis=1)
                d_total_sum += tl.sum(d_total)
            dk += d_writes
            for_queries = load_tile(MA_ptr, rows, G * C, t, C, inside)
            dq = tl.dot(for_queries, k, dq, input_precision=P)
            dk = tl.dot(tl.trans(for_queries), q, dk, input_precision=P)
            dk = tl.dot(load_tile(ML_ptr, rows, G * C, t, C, inside), k, dk, input_precision=P)
        dq += same[:, None] * k
        dk += same[:, None] * q
        store_tile(dq_ptr, rows, G * K, channels, K, inside, dq)
        store_tile(dk_ptr, rows, G * K, channels, K, inside, dk)
        if L2NORM:
            along_q += tl.sum(q * dq, axis=1)
            along_k += tl.sum(k * dk, axis=1)
    if dg_ptr is not None and DECAY == "head":
        dg = dg_pairs + tl.sum(tl.where(i >= j, dg_rows[:, None], 0.0), axis=0)
        dg += tl.sum(tl.where(i < j, dg_columns[:, None], 0.0), axis=0) + d_total_sum * tl.load(total_ptr + here)
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + head).to(tl.float32)
        u = tl.load(g_ptr + rows * G + head, mask=inside, other=0.0)
        dg, dA = gate_gradients(u, dg, rate, bias, gate_constant, GATE)
        d_A_log += tl.sum(tl.where(inside, dA, 0.0))
        tl.store(dg_ptr + rows * G + head, dg.to(dg_ptr.dtype.element_ty), mask=inside)
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + here, tl.sum(tl.where(inside, dg, 0.0)))
    if d_A_log_ptr is not None:
        tl.store(d_A_log_ptr + here, d_A_log)
    if L2NORM:
        tl.debug_barrier()
        inverse = query_norm * inverse_scale
        _take_from_norm(q_ptr, dq_ptr, rows, H * K, G * K, inside, along_q * inverse * inverse, K, BK)
        _take_from_norm(k_ptr, dk_ptr, rows, H * K, G * K, inside, along_k * key_norm * key_norm, K, BK)
