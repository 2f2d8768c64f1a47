"""Kernels of a decay per channel: the inputs of the scans, and the gradients of q, k and g.

Both run one program per chunk and value head. With a_t = e^g_t and C the last token of the chunk:
    A_ij = scale q_i . (a_{j+1} ... a_i) k_j for i >= j
    queries_i = scale q_i a_1 ... a_i,  writes_j = k_j a_{j+1} ... a_C
Decays are differences of the sums of log2 decays up to each token, which the kernels keep in memory. Pairs i > j meet
as in `recurrence/triton_channel_pairs.py`.

Legend: H key heads, HV value heads, K/V key/value head dim, C tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_channel_pairs import channel_pair_gradients, channel_scores
from hybridlm_kernels.recurrence.triton_tiles import (
    C,
    cumulative_sums,
    gate_gradients,
    gate_rate,
    load_gates,
    load_sums,
    load_tile,
    locate_chunk,
    log2_decay,
    store_mirrored,
    store_tile,
    sum_over,
)
from hybridlm_kernels.triton_support import tuned

CHUNK_CONFIGS = [triton.Config({"BK": channels}, num_warps=warps, num_stages=1)
                 for channels, warps in ((64, 8), (32, 4), (32, 8), (64, 4))]


@tuned(CHUNK_CONFIGS, ["K", "SCORES", "MERGED", "CHECKED", "EXACT"])
@triton.jit
def chunk_kernel(q_ptr, k_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant, chunks_ptr, A_ptr, total_ptr, sums_ptr,
                 queries_ptr, writes_ptr, scale, H, HV, K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
                 SCORES: tl.constexpr, MERGED: tl.constexpr, CHECKED: tl.constexpr, EXACT: tl.constexpr):
    """Write queries, writes and the sums of log2 decays, all [tokens, HV, K], and with SCORES A [tokens, HV, C] and the
    decays of chunks [P, HV, K]."""
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside = t < filled
    of_head, of_key_head = first * HV + head, (first * H + head // (HV // H)) * K
    q_ptr += of_key_head  # from here on tokens are counted from the chunk's first, in 32 bits
    k_ptr += of_key_head
    g_ptr += of_head * K
    sums_ptr += of_head * K
    queries_ptr += of_head * K
    writes_ptr += of_head * K
    rate = gate_rate(A_log_ptr, head)
    for k0 in tl.range(0, K, BK, disable_licm=True):
        channels = k0 + tl.arange(0, BK)
        u, bias = load_gates(g_ptr, None if bias_ptr is None else bias_ptr + head * K, t, HV * K, channels, K, inside)
        sums = cumulative_sums(log2_decay(u, rate, bias, gate_constant, inside, GATE), EXACT)
        store_tile(sums_ptr, t, HV * K, channels, K, inside, sums)
        q = load_tile(q_ptr, t, H * K, channels, K, inside)
        store_tile(queries_ptr, t, HV * K, channels, K, inside, q * (tl.exp2(sums.to(tl.float32)) * scale))
        end = tl.sum(tl.where(t[:, None] == C - 1, sums, 0.0), axis=0)  # decays behind the last token are 0
        k = load_tile(k_ptr, t, H * K, channels, K, inside)
        store_tile(writes_ptr, t, HV * K, channels, K, inside, k * tl.exp2((end[None, :] - sums).to(tl.float32)))
        if SCORES:
            tl.store(total_ptr + (chunk * HV + head) * K + channels, tl.exp2(end.to(tl.float32)), mask=channels < K)
    if SCORES:
        tl.debug_barrier()  # sums that other threads of the program wrote are read from here on
        A, itself = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
        for k0 in tl.range(0, K, BK, disable_licm=True):
            channels = k0 + tl.arange(0, BK)
            q = load_tile(q_ptr, t, H * K, channels, K, inside)
            k = load_tile(k_ptr, t, H * K, channels, K, inside)
            sums = load_sums(sums_ptr, t, HV * K, channels, K, filled)
            itself += tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)
            A, _ = channel_scores(q, k, k, sums, sums_ptr, HV * K, channels, K, filled, A, A, False, False, MERGED,
                                  CHECKED, EXACT)
        A = tl.where(t[:, None] == t[None, :], itself[:, None], A) * scale
        store_tile(A_ptr + of_head * C, t, HV * C, t, C, inside, A)


GRADIENTS_CONFIGS = [triton.Config({"BK": channels, "BV": values}, num_warps=warps, num_stages=1)
                     for channels, values, warps in ((64, 64, 8), (32, 64, 8), (32, 32, 4), (16, 32, 8))]
PAIRS_CONFIGS = [GRADIENTS_CONFIGS[n] for n in (1, 0, 2, 3)]


@tuned(PAIRS_CONFIGS, ["K", "V", "MERGED", "EXACT"])
@triton.jit
def pair_gradients_kernel(q_ptr, k_ptr, v_ptr, do_ptr, sums_ptr, chunks_ptr, scratch_ptr, itself_ptr, dq_pairs_ptr,
                          dk_pairs_ptr, dg_pairs_ptr, scale, H, HV, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                          BV: tl.constexpr, MERGED: tl.constexpr, EXACT: tl.constexpr):
    """Write the terms of dq, dk, dg [tokens, HV, K] that come from pairs of tokens, and the gradients of A_ii, itself
    [tokens, HV] in fp32.

    `sums` are those of `chunk_kernel`, `scratch` is memory for the gradient of A, [tokens, HV, C]. In one launch with
    the terms of states they would not fit the registers.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    _chunk, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside = t < filled
    of_head, of_key_head = first * HV + head, (first * H + head // (HV // H)) * K
    q_ptr += of_key_head  # from here on tokens are counted from the chunk's first, in 32 bits
    k_ptr += of_key_head
    sums_ptr += of_head * K
    scratch_ptr += of_head * C
    M = tl.zeros([C, C], tl.float32)
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        do = load_tile(do_ptr + of_head * V, t, HV * V, columns, V, inside)
        v = load_tile(v_ptr + of_head * V, t, HV * V, columns, V, inside)
        M = tl.dot(do, tl.trans(v), M, input_precision=PRECISION)
    M *= scale
    tl.store(itself_ptr + of_head + t * HV, tl.sum(tl.where(t[:, None] == t[None, :], M, 0.0), axis=1), mask=inside)
    store_mirrored(scratch_ptr, HV * C, t, filled, M)
    tl.debug_barrier()  # what other threads of the program wrote is read from here on
    for k0 in tl.range(0, K, BK, disable_licm=True):
        channels = k0 + tl.arange(0, BK)
        q = load_tile(q_ptr, t, H * K, channels, K, inside)
        k = load_tile(k_ptr, t, H * K, channels, K, inside)
        sums = load_sums(sums_ptr, t, HV * K, channels, K, filled)
        dq, dk, dg = channel_pair_gradients(q, k, sums, sums_ptr, HV * K, channels, K, scratch_ptr, None, HV * C,
                                            filled, False, False, MERGED, EXACT)
        store_tile(dq_pairs_ptr + of_head * K, t, HV * K, channels, K, inside, dq)
        store_tile(dk_pairs_ptr + of_head * K, t, HV * K, channels, K, inside, dk)
        if dg_pairs_ptr is not None:
            store_tile(dg_pairs_ptr + of_head * K, t, HV * K, channels, K, inside, dg)


@tuned(GRADIENTS_CONFIGS, ["K", "V", "EXACT"])
@triton.jit
def gradients_kernel(q_ptr, k_ptr, v_ptr, do_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant, S_ptr, dS_ptr, total_ptr,
                     sums_ptr, chunks_ptr, itself_ptr, dq_pairs_ptr, dk_pairs_ptr, dg_pairs_ptr, dq_ptr, dk_ptr, dg_ptr,
                     d_A_log_ptr, d_bias_ptr, scale, H, HV, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                     BV: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr):
    """Write dq, dk, dg [tokens, HV, K], and per chunk d_A_log [P, HV] and d_bias [P, HV, K].

    S are the states before chunks and dS the gradients of those after them [P, HV, K, V], sums those of `chunk_kernel`,
    itself, dq_pairs, dk_pairs and dg_pairs those of `pair_gradients_kernel`.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    # A head of one block has no loop over blocks, and what such a loop keeps apart would not fit the registers.
    CHANNELS: tl.constexpr = BK // 2 if K <= BK and BK > 16 else BK
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside, i, j = t < filled, t[:, None], t[None, :]
    here = chunk * HV + head
    of_head, of_key_head = first * HV + head, (first * H + head // (HV // H)) * K
    at_keys, at_values, at_state = of_head * K, of_head * V, here * K * V
    itself = tl.load(itself_ptr + of_head + t * HV, mask=inside, other=0.0)
    rate = gate_rate(A_log_ptr, head)
    d_A_log = 0.0
    for k0 in tl.range(0, K, CHANNELS, disable_licm=True):
        channels = k0 + tl.arange(0, CHANNELS)
        dq, dk = tl.zeros([C, CHANNELS], tl.float32), tl.zeros([C, CHANNELS], tl.float32)
        d_total = tl.zeros([CHANNELS], tl.float32)
        for v0 in range(0, V, BV):
            columns = v0 + tl.arange(0, BV)
            S = load_tile(S_ptr + at_state, channels, V, columns, V, channels < K)
            dS = load_tile(dS_ptr + at_state, channels, V, columns, V, channels < K)
            do = load_tile(do_ptr + at_values, t, HV * V, columns, V, inside)
            v = load_tile(v_ptr + at_values, t, HV * V, columns, V, inside)
            d_total += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
            dq = tl.dot(do, tl.trans(S), dq, input_precision=PRECISION)
            dk = tl.dot(v, tl.trans(dS), dk, input_precision=PRECISION)
        q = load_tile(q_ptr + of_key_head, t, H * K, channels, K, inside)
        k = load_tile(k_ptr + of_key_head, t, H * K, channels, K, inside)
        sums = load_sums(sums_ptr + at_keys, t, HV * K, channels, K, filled)
        last = at_keys + (filled - 1).to(tl.int64) * HV * K
        end = tl.load(sums_ptr + last + channels, mask=channels < K, other=0.0)
        dq *= tl.exp2(sums.to(tl.float32)) * scale
        dk *= tl.exp2((end[None, :] - sums).to(tl.float32))
        if dg_ptr is not None:
            dg = sum_over(j >= i, q * dq, EXACT) + sum_over(j < i, k * dk, EXACT)
            total = tl.load(total_ptr + here * K + channels, mask=channels < K, other=0.0)
            dg += (d_total * total)[None, :] + load_tile(dg_pairs_ptr + at_keys, t, HV * K, channels, K, inside)
            u, bias = load_gates(g_ptr + at_keys, None if bias_ptr is None else bias_ptr + head * K, t, HV * K,
                                 channels, K, inside)
            dg, dA = gate_gradients(u, dg, rate, bias, gate_constant, GATE)
            dg = tl.where(inside[:, None], dg, 0.0)
            store_tile(dg_ptr + at_keys, t, HV * K, channels, K, inside, dg)
            d_A_log += tl.sum(tl.where(inside[:, None] & (channels < K)[None, :], dA, 0.0))
            if d_bias_ptr is not None:
                tl.store(d_bias_ptr + here * K + channels, tl.sum(dg, axis=0), mask=channels < K)
        dq += load_tile(dq_pairs_ptr + at_keys, t, HV * K, channels, K, inside) + itself[:, None] * k
        dk += load_tile(dk_pairs_ptr + at_keys, t, HV * K, channels, K, inside) + itself[:, None] * q
        store_tile(dq_ptr + at_keys, t, HV * K, channels, K, inside, dq)
        store_tile(dk_ptr + at_keys, t, HV * K, channels, K, inside, dk)
    if d_A_log_ptr is not None:
        tl.store(d_A_log_ptr + here, d_A_log)
