"""Decayed queries, keys and writes of a decay per channel, for the scans, and what the scores of chunks start from.

With a_t = e^g_t and C the last token of the chunk:
    queries_i = scale q_i / |q_i| a_1 ... a_i,  keys_i = k_i / |k_i| a_1 ... a_i
    writes_j = k_j / |k_j| a_{j+1} ... a_C
An erase key p_i takes the place of k_i / |k_i| in keys_i, a read before the decay leaves a_i out of them, and value
keys make value writes as keys make writes. The backward pass runs it again rather than to keep what it writes.

Legend: H key heads, HV value heads, K key head dim, C = 64 tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_chunk import KEY_NORM, NUM_FACTORS, QUERY_NORM, store_factors
from hybridlm_kernels.recurrence.triton_tiles import (
    C,
    cumulative_sums,
    gate_rate,
    load_gates,
    load_tile,
    locate_chunk,
    locate_tokens,
    log2_decay,
    store_tile,
)
from hybridlm_kernels.triton_support import tuned

CONFIGS = [triton.Config({"BK": channels}, num_warps=warps, num_stages=stages)
           for channels, warps, stages in ((32, 4, 1), (64, 4, 1), (16, 4, 1), (32, 4, 2))]


@tuned(CONFIGS, ["K", "BEFORE", "STEPS", "FACTORS", "EXACT"])
@triton.jit(do_not_specialize=["tokens"])
def decayed_kernel(q_ptr, p_ptr, k_ptr, value_keys_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, chunks_ptr, factors_ptr,
                   total_ptr, sums_ptr, queries_ptr, keys_ptr, writes_ptr, value_writes_ptr, scale, gate_constant,
                   beta_scale, tokens, H, HV, K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
                   L2NORM: tl.constexpr, SIGMOID: tl.constexpr, BEFORE: tl.constexpr, STEPS: tl.constexpr,
                   FACTORS: tl.constexpr, EXACT: tl.constexpr):
    """Write queries, keys, writes and the cumulative sums of log2 decays, all [tokens, HV, K]; given value keys, their
    writes, too. Where a token is STEPS rows, `tokens` are rows, but those of q, g and queries.

    With FACTORS also write the factors [HV, 8, tokens] and total [P, HV, K]; without it the factors are read. One
    program per chunk and head.
    """
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    i = tl.arange(0, C)
    inside = i < filled
    first_token, token, decays, reads = locate_tokens(first, inside, STEPS)
    of_head, of_key_head = first * HV + head, (first * H + head // (HV // H)) * K
    of_token = first_token * HV + head
    q_ptr += (first_token * H + head // (HV // H)) * K  # from here on tokens are counted from the chunk's first
    k_ptr += of_key_head
    value_keys_ptr = None if value_keys_ptr is None else value_keys_ptr + of_key_head
    g_ptr += of_token * K
    queries_ptr += of_token * K
    keys_ptr += of_head * K
    writes_ptr += of_head * K
    sums_ptr += of_head * K
    factors_ptr += head * NUM_FACTORS * tokens + first
    rate = gate_rate(A_log_ptr, head)
    if FACTORS:
        store_factors(q_ptr, k_ptr, value_keys_ptr, None if beta_ptr is None else beta_ptr + of_head, factors_ptr,
                      tokens, inside, token, reads, H, HV, scale, beta_scale, K, BK, True, L2NORM, SIGMOID)
        tl.debug_barrier()
    q_norm = tl.load(factors_ptr + QUERY_NORM * tokens + i, mask=inside, other=0.0)
    k_norm = tl.load(factors_ptr + KEY_NORM * tokens + i, mask=inside, other=0.0)
    for k0 in tl.range(0, K, BK, disable_licm=True):
        columns = k0 + tl.arange(0, BK)
        q = load_tile(q_ptr, token, H * K, columns, K, reads)
        k = load_tile(k_ptr, i, H * K, columns, K, inside)
        u, bias = load_gates(g_ptr, None if bias_ptr is None else bias_ptr + head * K, token, HV * K, columns, K,
                             decays)
        g = log2_decay(u, rate, bias, gate_constant, decays, GATE)
        sums = cumulative_sums(g, EXACT)
        store_tile(sums_ptr, i, HV * K, columns, K, inside, sums)
        prefix = tl.exp2(sums.to(tl.float32))
        store_tile(queries_ptr, token, HV * K, columns, K, reads, q * (prefix * q_norm[:, None]))
        if BEFORE:
            prefix = tl.exp2((sums - g).to(tl.float32))
        if p_ptr is not None:
            p = load_tile(p_ptr + of_key_head, i, H * K, columns, K, inside)
            store_tile(keys_ptr, i, HV * K, columns, K, inside, p * prefix)
        else:
            store_tile(keys_ptr, i, HV * K, columns, K, inside, k * (prefix * k_norm[:, None]))
        end = tl.sum(tl.where(i[:, None] == C - 1, sums, 0.0), axis=0)  # decays behind the last token are 0
        to_end = tl.exp2((end[None, :] - sums).to(tl.float32))
        store_tile(writes_ptr, i, HV * K, columns, K, inside, k * (to_end * k_norm[:, None]))
        if value_keys_ptr is not None:
            value_keys = load_tile(value_keys_ptr, i, H * K, columns, K, inside)
            store_tile(value_writes_ptr + of_head * K, i, HV * K, columns, K, inside, value_keys * to_end)
        if FACTORS:
            tl.store(total_ptr + (chunk * HV + head) * K + columns, tl.exp2(end.to(tl.float32)), mask=columns < K)
