"""Gradients of the inputs after the scans of the backward pass: one program per chunk and value head.

With S the state at the start of a chunk and dS' the gradient of that after it, the gradients of the decayed queries,
keys and writes are dO S^T, -B Z S^T and B Y dS'^T. Those of q, k and g follow from them and from those of the scores
(`triton_pair_gradients.py`). A gate t is a factor of the pair (i, j) when j < t <= i, and of an erase key that reads
before the decay when j < t < i.

Legend: H key heads, HV value heads, K/V key/value head dim, C tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_chunk import (
    BETA,
    KEY,
    KEY_NORM,
    NUM_FACTORS,
    QUERY,
    QUERY_NORM,
    WRITE,
)
from hybridlm_kernels.ops.delta_rule.triton_pair_gradients import score_gradients
from hybridlm_kernels.recurrence.triton_tiles import (
    C,
    gate_bias,
    gate_gradients,
    gate_rate,
    load_gates,
    load_sums,
    load_tile,
    locate_chunk,
    locate_tokens,
    store_tile,
    sum_over,
)
from hybridlm_kernels.triton_support import tuned


@triton.jit
def _state_gradients(do_ptr, y_ptr, z_ptr, S_ptr, dS_ptr, rows, stride, inside, token, reads, channels, K: tl.constexpr,
                     V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LOADS_FIRST: tl.constexpr,
                     PRECISION: tl.constexpr):
    """The products dO S^T, -Z S^T and Y dS'^T of some channels, and the row sums of S dS'.

    With LOADS_FIRST no product is waited for while a load could be under way, for more registers.
    """
    d_queries, d_keys = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    d_writes, d_total = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
    real = channels < K
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        S = load_tile(S_ptr, channels, V, columns, V, real)
        do = load_tile(do_ptr, token, stride, columns, V, reads)
        z = load_tile(z_ptr, rows, stride, columns, V, inside)
        if LOADS_FIRST:
            dS = load_tile(dS_ptr, channels, V, columns, V, real)
            y = load_tile(y_ptr, rows, stride, columns, V, inside)
        d_queries = tl.dot(do, tl.trans(S), d_queries, input_precision=PRECISION)
        d_keys = tl.dot(z, tl.trans(S), d_keys, input_precision=PRECISION)
        if not LOADS_FIRST:
            dS = load_tile(dS_ptr, channels, V, columns, V, real)
            y = load_tile(y_ptr, rows, stride, columns, V, inside)
        d_total += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
        d_writes = tl.dot(y, tl.trans(dS), d_writes, input_precision=PRECISION)
    return d_queries, -d_keys, d_writes, d_total


@triton.jit
def _remove_along(x_ptr, dx_ptr, rows, stride, d_stride, inside, weight, K: tl.constexpr, BK: tl.constexpr):
    """Subtract weight x from dx: the component of a gradient along x, which the l2 norm removes."""
    for k0 in range(0, K, BK):
        columns = k0 + tl.arange(0, BK)
        x = load_tile(x_ptr, rows, stride, columns, K, inside)
        dx = load_tile(dx_ptr, rows, d_stride, columns, K, inside).to(tl.float32)
        store_tile(dx_ptr, rows, d_stride, columns, K, inside, dx - weight[:, None] * x)


CONFIGS = [triton.Config({"BK": channels, "BV": values}, num_warps=warps, num_stages=stages)
           for channels, values, warps, stages in ((64, 64, 8, 1), (32, 64, 8, 1), (32, 32, 4, 1), (16, 32, 8, 1))]


@tuned(CONFIGS, ["K", "V", "DECAY", "OWN", "BEFORE", "STEPS", "EXACT"])
@triton.jit(do_not_specialize=["tokens"])
def gradients_kernel(q_ptr, p_ptr, k_ptr, g_ptr, A_log_ptr, bias_ptr, do_ptr, y_ptr, z_ptr, factors_ptr, total_ptr,
                     sums_ptr, S_ptr, dS_ptr, chunks_ptr, scratch_ptr, itself_ptr, dq_pairs_ptr,
                     dp_pairs_ptr, dk_pairs_ptr, dg_pairs_ptr, dq_ptr, dp_ptr, dk_ptr, dv_ptr, dg_ptr, d_beta_ptr,
                     d_A_log_ptr, d_bias_ptr, inverse_scale, gate_constant, beta_scale, tokens, H, HV, K: tl.constexpr,
                     V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
                     L2NORM: tl.constexpr, SIGMOID: tl.constexpr, OWN: tl.constexpr, BEFORE: tl.constexpr,
                     STEPS: tl.constexpr, EXACT: tl.constexpr):
    """Write dq, dk [tokens, HV, K], with OWN dp like them, dv [tokens, HV, V], dg like g, d_beta [tokens, HV], and per
    chunk d_A_log [P, HV] and d_bias [P, HV(, K)].

    With a decay per channel `pair_gradients_kernel` has written dv, d_beta, the terms dq_pairs, dp_pairs, dk_pairs and
    dg_pairs, and those of A_ii in `itself` [HV, tokens]. Else `scratch`, [2, tokens, HV, C], is memory of this kernel.
    What is there before a launch is never both read and overwritten, since a launch that is tuned runs many times.
    Where a token is STEPS rows, `tokens` are rows, but those of q, g, do, A and their gradients.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    # A head of one block has no loop over blocks, and what such a loop keeps apart would not fit the registers.
    CHANNELS: tl.constexpr = BK // 2 if K <= BK and BK > 16 else BK
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside = t < filled
    i, j = t[:, None], t[None, :]
    here = chunk * HV + head
    first_token, token, decays, reads = locate_tokens(first, inside, STEPS)
    of_token = first_token * HV + head
    of_key_head, of_head = first * H + head // (HV // H), first * HV + head
    q_ptr += (first_token * H + head // (HV // H)) * K  # from here on tokens are counted from the chunk's first
    p_ptr = p_ptr + of_key_head * K if OWN else None
    k_ptr += of_key_head * K
    do_ptr += of_token * V
    y_ptr += of_head * V
    z_ptr += of_head * V
    factors_ptr += head * NUM_FACTORS * tokens + first
    beta = tl.load(factors_ptr + BETA * tokens + t, mask=inside, other=0.0)
    query_norm = tl.load(factors_ptr + QUERY_NORM * tokens + t, mask=inside, other=0.0)
    key_norm = tl.load(factors_ptr + KEY_NORM * tokens + t, mask=inside, other=0.0)
    MA_ptr = scratch_ptr + of_head * C
    ML_ptr = MA_ptr + (chunk - chunk + HV) * tokens * C  # in 64 bits
    if DECAY == "channel":
        itself = tl.load(itself_ptr + head * tokens + first + t, mask=inside, other=0.0)
    else:
        itself = score_gradients(do_ptr, y_ptr, z_ptr, dv_ptr + of_head * V,
                                 None if d_beta_ptr is None else d_beta_ptr + of_head, MA_ptr, ML_ptr, factors_ptr,
                                 filled, token, reads, tokens, HV, beta_scale, V, BV, DECAY, OWN, BEFORE, False,
                                 SIGMOID, EXACT)
        tl.debug_barrier()  # what other threads of the program wrote is read from here on
    itself *= query_norm * beta * key_norm
    if DECAY == "channel":
        of_queries, of_keys, of_writes = query_norm, beta if OWN else beta * key_norm, beta * key_norm
    else:
        of_queries = tl.load(factors_ptr + QUERY * tokens + t, mask=inside, other=0.0)
        of_keys = beta * tl.load(factors_ptr + KEY * tokens + t, mask=inside, other=0.0)
        of_writes = beta * tl.load(factors_ptr + WRITE * tokens + t, mask=inside, other=0.0)
    rate = gate_rate(A_log_ptr, head)
    dg_rows, dg_columns = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    dg_before = tl.zeros([C], tl.float32)  # rows that leave out the decay of their own token
    d_total_sum, d_A_log = 0.0, 0.0
    along_q, along_k = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for k0 in tl.range(0, K, CHANNELS, disable_licm=True):
        channels = k0 + tl.arange(0, CHANNELS)
        at_state = here * K * V
        d_queries, d_keys, d_writes, d_total = _state_gradients(
            do_ptr, y_ptr, z_ptr, S_ptr + at_state, dS_ptr + at_state, t, HV * V, inside, token, reads, channels, K, V,
            CHANNELS, BV, DECAY != "channel", PRECISION)
        q = load_tile(q_ptr, token, H * K, channels, K, reads)
        k = load_tile(k_ptr, t, H * K, channels, K, inside)
        p = load_tile(p_ptr, t, H * K, channels, K, inside) if OWN else k
        dq = d_queries * of_queries[:, None]
        dp = d_keys * of_keys[:, None]
        d_writes *= of_writes[:, None]
        if DECAY == "channel":
            sums = load_sums(sums_ptr + of_head * K, t, HV * K, channels, K, filled)
            last = of_head * K + (filled - 1).to(tl.int64) * HV * K
            end = tl.load(sums_ptr + last + channels, mask=channels < K, other=0.0)
            prefix = tl.exp2(sums.to(tl.float32))
            dq *= prefix
            if BEFORE:
                sums_before = load_sums(sums_ptr + of_head * K, t - 1, HV * K, channels, K, filled)
                prefix = tl.exp2(sums_before.to(tl.float32))
            dp *= prefix
            d_writes *= tl.exp2((end[None, :] - sums).to(tl.float32))
            total = tl.load(total_ptr + here * K + channels, mask=channels < K, other=0.0)
            if dg_ptr is not None:
                if BEFORE:
                    dg = sum_over(j >= i, q * dq, EXACT) + sum_over(j > i, p * dp, EXACT)
                    dg += sum_over(j < i, k * d_writes, EXACT)
                else:
                    dg = sum_over(j >= i, q * dq + p * dp, EXACT) + sum_over(j < i, k * d_writes, EXACT)
                dg += (d_total * total)[None, :] + load_tile(dg_pairs_ptr + of_head * K, t, HV * K, channels, K, inside)
                u, bias = load_gates(g_ptr + of_token * K, None if bias_ptr is None else bias_ptr + head * K, token,
                                     HV * K, channels, K, decays)
                dg, dA = gate_gradients(u, dg, rate, bias, gate_constant, GATE)
                dg = tl.where(decays[:, None], dg, 0.0)
                d_A_log += tl.sum(tl.where(decays[:, None], dA, 0.0))
                store_tile(dg_ptr + of_token * K, token, HV * K, channels, K, decays, dg)
                if d_bias_ptr is not None:
                    tl.store(d_bias_ptr + here * K + channels, tl.sum(dg, axis=0), mask=channels < K)
            dq += load_tile(dq_pairs_ptr + of_token * K, token, HV * K, channels, K, reads)
            d_writes += load_tile(dk_pairs_ptr + of_head * K, t, HV * K, channels, K, inside)
            if OWN:
                dp += load_tile(dp_pairs_ptr + of_head * K, t, HV * K, channels, K, inside)
        else:
            MA = load_tile(MA_ptr, t, HV * C, t, C, inside)
            ML = load_tile(ML_ptr, t, HV * C, t, C, inside)
            dq = tl.dot(MA, k, dq, input_precision=PRECISION)
            dp = tl.dot(ML, k, dp, input_precision=PRECISION)
            earlier = tl.dot(tl.trans(MA), q, input_precision=PRECISION)  # of dk, where k is the earlier of a pair
            earlier = tl.dot(tl.trans(ML), p, earlier, input_precision=PRECISION)
            if DECAY == "scalar":
                rows = q * dq - k * earlier
                if BEFORE:
                    dg_before += tl.sum(p * dp, axis=1)
                else:
                    rows += p * dp
                dg_rows += tl.sum(rows, axis=1)
                dg_columns += tl.sum(k * d_writes, axis=1)
                d_total_sum += tl.sum(d_total)
            d_writes += earlier
        if OWN:
            dk = d_writes
        else:
            dk = dp + d_writes
        dq += itself[:, None] * k
        dk += itself[:, None] * q
        store_tile(dq_ptr + of_token * K, token, HV * K, channels, K, reads, dq)
        store_tile(dk_ptr + of_head * K, t, HV * K, channels, K, inside, dk)
        if OWN:
            store_tile(dp_ptr + of_head * K, t, HV * K, channels, K, inside, dp)
        if L2NORM:
            along_q += tl.sum(q * dq, axis=1)
            along_k += tl.sum(k * dk, axis=1)
    if dg_ptr is not None and DECAY == "scalar":
        dg = tl.sum(tl.where(i >= j, dg_rows[:, None], 0.0), axis=0)
        dg += tl.sum(tl.where(i < j, dg_columns[:, None], 0.0), axis=0) + d_total_sum * tl.load(total_ptr + here)
        if BEFORE:
            dg += tl.sum(tl.where(i > j, dg_before[:, None], 0.0), axis=0)
        bias = gate_bias(bias_ptr, head)
        u = tl.load(g_ptr + of_token + token * HV, mask=decays, other=0.0)
        dg, dA = gate_gradients(u, dg, rate, bias, gate_constant, GATE)
        d_A_log += tl.sum(tl.where(decays, dA, 0.0))
        tl.store(dg_ptr + of_token + token * HV, dg.to(dg_ptr.dtype.element_ty), mask=decays)
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + here, tl.sum(tl.where(decays, dg, 0.0)))
    if d_A_log_ptr is not None:
        tl.store(d_A_log_ptr + here, d_A_log)
    if L2NORM:
        tl.debug_barrier()
        inverse = query_norm * inverse_scale
        _remove_along(q_ptr, dq_ptr + of_token * K, token, H * K, HV * K, reads, along_q * inverse * inverse, K, BK)
        _remove_along(k_ptr, dk_ptr + of_head * K, t, H * K, HV * K, inside, along_k * key_norm * key_norm, K, BK)
