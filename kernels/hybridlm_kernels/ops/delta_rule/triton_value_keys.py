"""Gradients of the keys at which values are written where erase vectors are free, and what they add to others.

A chunk's values V are written at keys n with scores A'_ij = q_i . (a_{j+1} ... a_i) n_j and L'_ij, the same of erase
keys below the diagonal. With Z of `triton_scan.py` and dS' the gradient of the state after the chunk:
    dA' = dO V^T,  dL' = -B Z V^T,  and that of the decayed keys is V dS'^T
Terms of dq, dp and dg from erase vectors are there already (`triton_pair_gradients.py`); those of values are added.

Legend: H key heads, HV value heads, K/V key/value head dim, C tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_chunk import NUM_FACTORS, QUERY_NORM
from hybridlm_kernels.ops.delta_rule.triton_pair_gradients import CONFIGS, score_gradients
from hybridlm_kernels.recurrence.triton_channel_pairs import channel_pair_gradients
from hybridlm_kernels.recurrence.triton_tiles import C, load_sums, load_tile, locate_chunk, store_tile, sum_over
from hybridlm_kernels.triton_support import tuned


@tuned(CONFIGS, ["K", "V", "BEFORE", "MERGED", "EXACT"])
@triton.jit(do_not_specialize=["tokens"])
def value_key_gradients_kernel(q_ptr, p_ptr, value_keys_ptr, v_ptr, do_ptr, z_ptr, dS_ptr, factors_ptr, sums_ptr,
                               chunks_ptr, scratch_ptr, from_vectors_dq_ptr, from_vectors_dp_ptr, from_vectors_dg_ptr,
                               dq_pairs_ptr, dp_pairs_ptr, dg_pairs_ptr, d_value_keys_ptr, tokens, H, HV,
                               K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                               BEFORE: tl.constexpr, MERGED: tl.constexpr, EXACT: tl.constexpr):
    """Write the gradients of value keys [tokens, HV, K], and the terms `from_vectors` of dq, dp and dg, with those of
    values added, as dq_pairs, dp_pairs and dg_pairs, all [tokens, HV, K].

    `scratch` is [2, tokens, HV, C]. One program per chunk and head.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside, i, j = t < filled, t[:, None], t[None, :]
    of_key_head, of_head = (first * H + head // (HV // H)) * K, first * HV + head
    q_ptr += of_key_head  # from here on tokens are counted from the chunk's first, in 32 bits
    p_ptr += of_key_head
    value_keys_ptr += of_key_head
    at_keys, at_state = of_head * K, (chunk * HV + head) * K * V
    do_ptr += of_head * V
    v_ptr += of_head * V
    z_ptr += of_head * V
    factors_ptr += head * NUM_FACTORS * tokens + first
    sums_ptr += at_keys
    MA_ptr = scratch_ptr + of_head * C
    ML_ptr = MA_ptr + (chunk - chunk + HV) * tokens * C  # in 64 bits
    itself = score_gradients(do_ptr, v_ptr, z_ptr, None, None, MA_ptr, ML_ptr, factors_ptr, filled, t, inside, tokens,
                             HV, 1.0, V, BV, "channel", True, BEFORE, True, False, EXACT)
    itself *= tl.load(factors_ptr + QUERY_NORM * tokens + t, mask=inside, other=0.0)
    tl.debug_barrier()  # what other threads of the program wrote is read from here on
    for k0 in tl.range(0, K, BK, disable_licm=True):  # masks of [C, C] would fill the registers
        channels = k0 + tl.arange(0, BK)
        sums = load_sums(sums_ptr, t, HV * K, channels, K, filled)
        q = load_tile(q_ptr, t, H * K, channels, K, inside)
        p = load_tile(p_ptr, t, H * K, channels, K, inside)
        n = load_tile(value_keys_ptr, t, H * K, channels, K, inside)
        dq, dp, dn, dg = channel_pair_gradients(q, p, n, sums, sums_ptr, HV * K, channels, K, MA_ptr, ML_ptr, HV * C,
                                                filled, True, True, BEFORE, MERGED, EXACT)
        dq += load_tile(from_vectors_dq_ptr + at_keys, t, HV * K, channels, K, inside) + itself[:, None] * n
        store_tile(dq_pairs_ptr + at_keys, t, HV * K, channels, K, inside, dq)
        dp += load_tile(from_vectors_dp_ptr + at_keys, t, HV * K, channels, K, inside)
        store_tile(dp_pairs_ptr + at_keys, t, HV * K, channels, K, inside, dp)
        dn += itself[:, None] * q
        d_writes = tl.zeros([C, BK], tl.float32)
        for v0 in range(0, V, BV):
            columns = v0 + tl.arange(0, BV)
            v = load_tile(v_ptr, t, HV * V, columns, V, inside)
            dS = load_tile(dS_ptr + at_state, channels, V, columns, V, channels < K)
            d_writes = tl.dot(v, tl.trans(dS), d_writes, input_precision=PRECISION)
        end = tl.load(sums_ptr + (filled - 1).to(tl.int64) * HV * K + channels, mask=channels < K, other=0.0)
        d_writes *= tl.exp2((end[None, :] - sums).to(tl.float32))
        store_tile(d_value_keys_ptr + at_keys, t, HV * K, channels, K, inside, dn + d_writes)
        if dg_pairs_ptr is not None:
            dg += sum_over(j < i, n * d_writes, EXACT)
            dg += load_tile(from_vectors_dg_ptr + at_keys, t, HV * K, channels, K, inside)
            store_tile(dg_pairs_ptr + at_keys, t, HV * K, channels, K, inside, dg)
