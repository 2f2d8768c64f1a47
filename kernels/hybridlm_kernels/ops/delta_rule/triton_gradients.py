"""Gradients of the inputs after the scans of the backward pass: one program per chunk and value head.

With S the state at the start of a chunk, dS' the gradient of that after it, D_ij = a_{j+1} ... a_i, B = diag(beta):
    dA_ij = dO_i . Y_j beta_j,  dL_ij = -beta_i Z_i . Y_j beta_j,  dbeta_i = Z_i . Y_i,  dV = B Z
The gradients of q, k and g follow from those of A and L and of the decayed queries, keys and writes. A gate t is a
factor of the pair (i, j) when j < t <= i. With a decay per channel the gradient of a sum of gates goes to its gates
level by level.

A program writes the gradients of the scores to `scratch` and reads them back as operands, in either orientation: so
they do not fill its registers, and no product takes the transposed result of another (which Triton before 3.7.1
compiles wrongly on Hopper).

Legend: H key heads, HV value heads, K/V key/value head dim, C tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_chunk import (
    BETA,
    DECAY_LOG2,
    KEY,
    KEY_NORM,
    NUM_FACTORS,
    QUERY,
    QUERY_NORM,
    WRITE,
)
from hybridlm_kernels.recurrence.triton_tiles import (
    LEVELS,
    C,
    decay_between,
    gate_bias,
    gate_gradients,
    gate_rate,
    lies_between,
    load_gates,
    load_tile,
    log2_decay,
    meet,
    second_half,
    store_tile,
    sum_over,
)
from hybridlm_kernels.triton_support import tuned


@triton.jit
def _products(a_ptr, b_ptr, rows, inside, b_rows, b_inside, stride, D: tl.constexpr, BD: tl.constexpr,
              BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Products of rows of a with rows of b, [C, BLOCK]."""
    products = tl.zeros([C, BLOCK], tl.float32)
    for d0 in range(0, D, BD):
        columns = d0 + tl.arange(0, BD)
        a = load_tile(a_ptr, rows, stride, columns, D, inside)
        b = load_tile(b_ptr, b_rows, stride, columns, D, b_inside)
        products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
    return products


@triton.jit
def _value_gradients(do_ptr, y_ptr, z_ptr, dv_ptr, rows, stride, inside, beta, V: tl.constexpr, BV: tl.constexpr):
    """Row sums of dO Y and of Z Y. Writes dV = B Z."""
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
def _store_mirrored(ptr, stride, columns, filled, x):
    """Store columns x [C, columns] of a chunk's scores, 0 on and above the diagonal, below it and mirrored above it."""
    t = tl.arange(0, C)
    half = x.to(ptr.dtype.element_ty)
    tl.store(ptr + t[:, None] * stride + columns[None, :], half,
             mask=(t < filled)[:, None] & (t[:, None] >= columns[None, :]))
    tl.store(ptr + columns[:, None] * stride + t[None, :], tl.trans(half),
             mask=(columns < filled)[:, None] & (t[None, :] > columns[:, None]))


@triton.jit
def _score_gradients(do_ptr, y_ptr, z_ptr, k_ptr, A_ptr, MA_ptr, ML_ptr, factors_ptr, filled, tokens, H, HV,
                     K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
                     EXACT: tl.constexpr):
    """Write MA and ML, the gradients of the queries' and the keys' scores, with all factors of the products of q and k.

    They stand below the diagonal and mirrored above it; above it MA is 0 unless the decay is one per channel. With a
    scalar decay the result is the gradient of the gates from pairs of tokens, else 0. Scores are taken some columns at
    a time.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    BLOCK: tl.constexpr = 32
    t = tl.arange(0, C)
    inside, i = t < filled, t[:, None]
    per_row = factors_ptr + t
    query_norm = tl.load(per_row + QUERY_NORM * tokens, mask=inside, other=0.0)
    written = tl.load(per_row + KEY_NORM * tokens, mask=inside, other=0.0)
    written *= tl.load(per_row + BETA * tokens, mask=inside, other=0.0)
    dg = tl.zeros([C], tl.float32)
    for j0 in range(0, C, BLOCK):
        at = j0 + tl.arange(0, BLOCK)
        in_columns, j = at < filled, at[None, :]
        per_column = factors_ptr + at
        beta = tl.load(per_column + BETA * tokens, mask=in_columns, other=0.0)[None, :]
        by_column = beta * tl.load(per_column + KEY_NORM * tokens, mask=in_columns, other=0.0)[None, :]
        MA = _products(do_ptr, y_ptr, t, inside, at, in_columns, HV * V, V, BV, BLOCK, PRECISION)
        ML = _products(z_ptr, y_ptr, t, inside, at, in_columns, HV * V, V, BV, BLOCK, PRECISION)
        MA = tl.where(i > j, MA, 0.0)
        ML = tl.where(i > j, ML, 0.0)
        if DECAY == "scalar":
            pairs = MA * beta * load_tile(A_ptr, t, HV * C, at, C, inside)
            g = tl.load(per_row + DECAY_LOG2 * tokens, mask=inside, other=0.0)
            D = decay_between(g, j, EXACT)
            MA *= D
            ML *= D
        MA *= query_norm[:, None] * by_column
        ML *= -written[:, None] * by_column
        if DECAY == "channel":
            _store_mirrored(MA_ptr, HV * C, at, filled, MA)
        else:
            store_tile(MA_ptr, t, HV * C, at, C, inside, MA)
        _store_mirrored(ML_ptr, HV * C, at, filled, ML)
        if DECAY == "scalar":
            pairs += ML * _products(k_ptr, k_ptr, t, inside, at, in_columns, H * K, K, BK, BLOCK, PRECISION)
            from_rows = tl.sum(tl.where(i >= t[None, :], tl.sum(pairs, axis=1)[:, None], 0.0), axis=0)
            dg += from_rows - tl.sum(tl.where(j >= i, tl.sum(pairs, axis=0)[None, :], 0.0), axis=1)
    return dg


@triton.jit
def _state_gradients(do_ptr, y_ptr, z_ptr, S_ptr, dS_ptr, rows, stride, inside, channels, K: tl.constexpr,
                     V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """The products dO S^T, -Z S^T and Y dS'^T of some channels, and the row sums of S dS'."""
    d_queries, d_keys = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    d_writes, d_total = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
    real = channels < K
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        S = load_tile(S_ptr, channels, V, columns, V, real)
        dS = load_tile(dS_ptr, channels, V, columns, V, real)
        d_total += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
        do = load_tile(do_ptr, rows, stride, columns, V, inside)
        d_queries = tl.dot(do, tl.trans(S), d_queries, input_precision=PRECISION)
        z = load_tile(z_ptr, rows, stride, columns, V, inside)
        d_keys = tl.dot(z, tl.trans(S), d_keys, input_precision=PRECISION)
        y = load_tile(y_ptr, rows, stride, columns, V, inside)
        d_writes = tl.dot(y, tl.trans(dS), d_writes, input_precision=PRECISION)
    return d_queries, -d_keys, d_writes, d_total


@triton.jit
def _channel_pairs(q, k, g, MA_ptr, ML_ptr, stride, inside, EXACT: tl.constexpr):
    """The terms of dq, dk and dg [C, channels] from pairs of tokens, given the mirrored gradients of the scores."""
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    t = tl.arange(0, C)
    i, j = t[:, None], t[None, :]
    dq, dk, dg = tl.zeros(g.shape, tl.float32), tl.zeros(g.shape, tl.float32), tl.zeros(g.shape, tl.float32)
    for e in tl.range(0, LEVELS, disable_licm=True, loop_unroll_factor=1):
        b = 1 << e
        factor = tl.exp2(sum_over(lies_between(i, j, b), g, EXACT))
        second = second_half(i, b)
        MA = tl.where(meet(i, j, b), load_tile(MA_ptr, t, stride, t, C, inside), 0.0).to(q.dtype)
        across = factor * tl.dot(MA, (tl.where(second, q, k) * factor).to(q.dtype), input_precision=PRECISION)
        ML = tl.where(meet(i, j, b), load_tile(ML_ptr, t, stride, t, C, inside), 0.0).to(q.dtype)
        dkf = factor * tl.dot(ML, (k * factor).to(k.dtype), input_precision=PRECISION)
        dqf = tl.where(second, across, 0.0)
        dkf += tl.where(second, 0.0, across)
        dq += dqf
        dk += dkf
        dg += sum_over(lies_between(j, i, b), q * dqf + k * dkf, EXACT)
    return dq, dk, dg


@triton.jit
def _remove_along(x_ptr, dx_ptr, rows, x_stride, dx_stride, inside, weight, K: tl.constexpr, BK: tl.constexpr):
    """Subtract weight x from dx: the component of a gradient along x, which the l2 norm removes."""
    for k0 in range(0, K, BK):
        columns = k0 + tl.arange(0, BK)
        x = load_tile(x_ptr, rows, x_stride, columns, K, inside).to(tl.float32)
        dx = load_tile(dx_ptr, rows, dx_stride, columns, K, inside).to(tl.float32)
        store_tile(dx_ptr, rows, dx_stride, columns, K, inside, dx - weight[:, None] * x)


CONFIGS = [triton.Config({"BK": channels, "BV": values}, num_warps=warps, num_stages=stages)
           for channels, values, warps, stages in ((16, 32, 8, 1), (16, 32, 4, 1), (32, 32, 8, 1), (64, 64, 8, 1))]


@tuned(CONFIGS, ["K", "V", "DECAY", "EXACT"])
@triton.jit
def gradients_kernel(q_ptr, k_ptr, g_ptr, A_log_ptr, bias_ptr, do_ptr, y_ptr, z_ptr, A_ptr, factors_ptr, total_ptr,
                     S_ptr, dS_ptr, chunks_ptr, scratch_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, d_beta_ptr, d_A_log_ptr,
                     d_bias_ptr, inverse_scale, gate_constant, beta_scale, tokens, H, HV, K: tl.constexpr,
                     V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
                     L2NORM: tl.constexpr, SIGMOID: tl.constexpr, EXACT: tl.constexpr):
    """Write dq, dk [tokens, HV, K], dv [tokens, HV, V], dg like g, d_beta [tokens, HV], and per chunk d_A_log [P, HV]
    and d_bias [P, HV(, K)].

    `scratch` is [2, tokens, HV, C].
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, filled = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    t = tl.arange(0, C)
    inside = t < filled
    i, j = t[:, None], t[None, :]
    here = chunk * HV + head
    of_key_head, of_head = first * H + head // (HV // H), first * HV + head
    q_ptr += of_key_head * K  # from here on tokens are counted from the chunk's first, in 32 bits
    k_ptr += of_key_head * K
    dq_ptr += of_head * K
    dk_ptr += of_head * K
    do_ptr += of_head * V
    y_ptr += of_head * V
    z_ptr += of_head * V
    factors_ptr += head * NUM_FACTORS * tokens + first
    beta = tl.load(factors_ptr + BETA * tokens + t, mask=inside, other=0.0)
    query_norm = tl.load(factors_ptr + QUERY_NORM * tokens + t, mask=inside, other=0.0)
    key_norm = tl.load(factors_ptr + KEY_NORM * tokens + t, mask=inside, other=0.0)

    MA_ptr = scratch_ptr + of_head * C
    ML_ptr = MA_ptr + (chunk - chunk + HV) * tokens * C
    same, d_beta = _value_gradients(do_ptr, y_ptr, z_ptr, dv_ptr + of_head * V, t, HV * V, inside, beta, V, BV)
    if d_beta_ptr is not None:
        if SIGMOID:
            d_beta *= beta * (1.0 - beta / beta_scale)
        tl.store(d_beta_ptr + of_head + t * HV, d_beta.to(d_beta_ptr.dtype.element_ty), mask=inside)
    same *= query_norm * beta * key_norm
    dg_pairs = _score_gradients(do_ptr, y_ptr, z_ptr, k_ptr, A_ptr + of_head * C, MA_ptr, ML_ptr, factors_ptr,
                                filled, tokens, H, HV, K, V, BK, BV, DECAY, EXACT)
    tl.debug_barrier()  # what other threads of the program wrote is read from here on
    if DECAY == "channel":
        g_ptr += of_head * K
        if dg_ptr is not None:
            dg_ptr += of_head * K
        if bias_ptr is not None:
            bias_ptr += head * K
    rate = gate_rate(A_log_ptr, head)
    if DECAY == "channel":
        of_queries, of_keys, of_writes = query_norm, beta * key_norm, beta * key_norm
    else:
        of_queries = tl.load(factors_ptr + QUERY * tokens + t, mask=inside, other=0.0)
        of_keys = beta * tl.load(factors_ptr + KEY * tokens + t, mask=inside, other=0.0)
        of_writes = beta * tl.load(factors_ptr + WRITE * tokens + t, mask=inside, other=0.0)
    dg_rows, dg_columns = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    d_total_sum, d_A_log = 0.0, 0.0
    along_q, along_k = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if DECAY == "channel":  # a loop of its own: with the gradients of the states registers do not suffice
        for k0 in tl.range(0, K, BK, disable_licm=True):  # masks of [C, C] would fill the registers
            channels = k0 + tl.arange(0, BK)
            u, bias = load_gates(g_ptr, bias_ptr, t, HV * K, channels, K, inside)
            g = log2_decay(u, rate, bias, gate_constant, inside, GATE)
            q = load_tile(q_ptr, t, H * K, channels, K, inside)
            k = load_tile(k_ptr, t, H * K, channels, K, inside)
            dq, dk, dg = _channel_pairs(q, k, g, MA_ptr, ML_ptr, HV * C, inside, EXACT)
            store_tile(dq_ptr, t, HV * K, channels, K, inside, dq)
            store_tile(dk_ptr, t, HV * K, channels, K, inside, dk)
            if dg_ptr is not None:
                store_tile(dg_ptr, t, HV * K, channels, K, inside, dg)
        tl.debug_barrier()
    for k0 in tl.range(0, K, BK, disable_licm=True):
        channels = k0 + tl.arange(0, BK)
        at_state = here * K * V
        d_queries, d_keys, d_writes, d_total = _state_gradients(
            do_ptr, y_ptr, z_ptr, S_ptr + at_state, dS_ptr + at_state, t, HV * V, inside, channels, K, V, BK, BV,
            PRECISION)
        q = load_tile(q_ptr, t, H * K, channels, K, inside)
        k = load_tile(k_ptr, t, H * K, channels, K, inside)
        dq = d_queries * of_queries[:, None]
        dk = d_keys * of_keys[:, None]
        d_writes *= of_writes[:, None]
        if DECAY == "channel":
            u, bias = load_gates(g_ptr, bias_ptr, t, HV * K, channels, K, inside)
            g = log2_decay(u, rate, bias, gate_constant, inside, GATE)
            prefix = tl.exp2(sum_over(j <= i, g, EXACT))
            dq *= prefix
            dk *= prefix
            d_writes *= tl.exp2(sum_over(j > i, g, EXACT))
            total = tl.load(total_ptr + here * K + channels, mask=channels < K, other=0.0)
            if dg_ptr is not None:
                dg = sum_over(j >= i, q * dq + k * dk, EXACT) + sum_over(j < i, k * d_writes, EXACT)
                dg += (d_total * total)[None, :] + load_tile(dg_ptr, t, HV * K, channels, K, inside)
                dg, dA = gate_gradients(u, dg, rate, bias, gate_constant, GATE)
                dg = tl.where(inside[:, None], dg, 0.0)
                d_A_log += tl.sum(tl.where(inside[:, None], dA, 0.0))
                store_tile(dg_ptr, t, HV * K, channels, K, inside, dg)
                if d_bias_ptr is not None:
                    tl.store(d_bias_ptr + here * K + channels, tl.sum(dg, axis=0), mask=channels < K)
            dq += load_tile(dq_ptr, t, HV * K, channels, K, inside)
            dk += d_writes + load_tile(dk_ptr, t, HV * K, channels, K, inside)
        else:
            if DECAY == "scalar":
                dg_rows += tl.sum(q * dq + k * dk, axis=1)
                dg_columns += tl.sum(k * d_writes, axis=1)
                d_total_sum += tl.sum(d_total)
            dk += d_writes
            for_queries = load_tile(MA_ptr, t, HV * C, t, C, inside)
            dq = tl.dot(for_queries, k, dq, input_precision=PRECISION)
            dk = tl.dot(tl.trans(for_queries), q, dk, input_precision=PRECISION)
            dk = tl.dot(load_tile(ML_ptr, t, HV * C, t, C, inside), k, dk, input_precision=PRECISION)
        dq += same[:, None] * k
        dk += same[:, None] * q
        store_tile(dq_ptr, t, HV * K, channels, K, inside, dq)
        store_tile(dk_ptr, t, HV * K, channels, K, inside, dk)
        if L2NORM:
            along_q += tl.sum(q * dq, axis=1)
            along_k += tl.sum(k * dk, axis=1)
    if dg_ptr is not None and DECAY == "scalar":
        dg = dg_pairs + tl.sum(tl.where(i >= j, dg_rows[:, None], 0.0), axis=0)
        dg += tl.sum(tl.where(i < j, dg_columns[:, None], 0.0), axis=0) + d_total_sum * tl.load(total_ptr + here)
        bias = gate_bias(bias_ptr, head)
        u = tl.load(g_ptr + of_head + t * HV, mask=inside, other=0.0)
        dg, dA = gate_gradients(u, dg, rate, bias, gate_constant, GATE)
        d_A_log += tl.sum(tl.where(inside, dA, 0.0))
        tl.store(dg_ptr + of_head + t * HV, dg.to(dg_ptr.dtype.element_ty), mask=inside)
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + here, tl.sum(tl.where(inside, dg, 0.0)))
    if d_A_log_ptr is not None:
        tl.store(d_A_log_ptr + here, d_A_log)
    if L2NORM:
        tl.debug_barrier()
        inverse = query_norm * inverse_scale
        _remove_along(q_ptr, dq_ptr, t, H * K, HV * K, inside, along_q * inverse * inverse, K, BK)
        _remove_along(k_ptr, dk_ptr, t, H * K, HV * K, inside, along_k * key_norm * key_norm, K, BK)
