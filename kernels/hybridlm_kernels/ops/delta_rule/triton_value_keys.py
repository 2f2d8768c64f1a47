"""The part of values in a chunk where erase vectors are free and values are written at keys of their own.

The values V are written at keys n with scores A'_ij = q_i . (a_{j+1} ... a_i) n_j and L'_ij, the same of erase keys
below the diagonal (`triton_chunk.py`), and N are the keys decayed to the chunk's end. Forward:
    R' = -L' V  for the negative reads,  O' = A' V  for the outputs
and backward, with Z of `triton_scan.py` (B = -I) and dS' the gradient of the state after the chunk:
    dV = A'^T dO + L'^T Z + N dS',  dA' = dO V^T,  dL' = Z V^T,  dN = V dS'^T
Terms of dq, dp and dg from erase vectors are there already (`triton_pair_gradients.py`); those of values are added.

Legend: H key heads, HV value heads, K/V key/value head dim, C tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_chunk import NUM_FACTORS, QUERY_NORM
from hybridlm_kernels.recurrence.triton_tiles import C, load_sums, load_tile, locate_chunk, store_tile, sum_over
from hybridlm_kernels.triton_support import tuned

PRODUCTS_CONFIGS = [triton.Config({"BV": values}, num_warps=4, num_stages=1) for values in (64, 32)]
VALUES_CONFIGS = [triton.Config({"BK": channels, "BV": values}, num_warps=4, num_stages=1)
                  for channels, values in ((64, 64), (32, 64), (32, 32))]
KEY_GRADIENTS = {"BK": 64, "BV": 64}  # sizes of tiles; with 4 warps


@tuned(PRODUCTS_CONFIGS, ["V", "EXACT"])
@triton.jit
def value_products_kernel(v_ptr, value_A_ptr, value_L_ptr, chunks_ptr, reads_ptr, outputs_ptr, HV, V: tl.constexpr,
                          BV: tl.constexpr, EXACT: tl.constexpr):
    """Write the negative reads R' and, unless None, the outputs O' [tokens, HV, V]; one program per chunk and head."""
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    _, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside = t < filled
    at_scores, at_values = (first * HV + head) * C, (first * HV + head) * V
    L = load_tile(value_L_ptr + at_scores, t, HV * C, t, C, inside)
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        v = load_tile(v_ptr + at_values, t, HV * V, columns, V, inside)
        reads = tl.dot(L, v, input_precision=PRECISION)
        store_tile(reads_ptr + at_values, t, HV * V, columns, V, inside, -reads)
        if outputs_ptr is not None:
            A = load_tile(value_A_ptr + at_scores, t, HV * C, t, C, inside)
            outputs = tl.dot(A, v, input_precision=PRECISION)
            store_tile(outputs_ptr + at_values, t, HV * V, columns, V, inside, outputs)


@tuned(VALUES_CONFIGS, ["K", "V", "EXACT"])
@triton.jit
def written_value_gradients_kernel(value_writes_ptr, value_A_ptr, value_L_ptr, do_ptr, z_ptr, dS_ptr, chunks_ptr,
                                   dv_ptr, HV, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                                   EXACT: tl.constexpr):
    """Write dv [tokens, HV, V]; one program per chunk and head."""
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside = t < filled
    at_scores, at_values, at_keys = (first * HV + head) * C, (first * HV + head) * V, (first * HV + head) * K
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        A = load_tile(value_A_ptr + at_scores, t, HV * C, t, C, inside)
        L = load_tile(value_L_ptr + at_scores, t, HV * C, t, C, inside)
        do = load_tile(do_ptr + at_values, t, HV * V, columns, V, inside)
        z = load_tile(z_ptr + at_values, t, HV * V, columns, V, inside)
        dv = tl.dot(tl.trans(A), do, input_precision=PRECISION)
        dv = tl.dot(tl.trans(L), z, dv, input_precision=PRECISION)
        for k0 in range(0, K, BK):
            channels = k0 + tl.arange(0, BK)
            n = load_tile(value_writes_ptr + at_keys, t, HV * K, channels, K, inside)
            dS = load_tile(dS_ptr + (chunk * HV + head) * K * V, channels, V, columns, V, channels < K)
            dv = tl.dot(n, dS, dv, input_precision=PRECISION)
        store_tile(dv_ptr + at_values, t, HV * V, columns, V, inside, dv)


@triton.jit(do_not_specialize=["tokens"])
def value_key_gradients_kernel(q_ptr, value_keys_ptr, v_ptr, dS_ptr, factors_ptr, sums_ptr, chunks_ptr, itself_ptr,
                               from_vectors_dq_ptr, from_vectors_dp_ptr, from_vectors_dg_ptr, dq_pairs_ptr,
                               dp_pairs_ptr, dg_pairs_ptr, d_value_keys_ptr, tokens, H, HV, K: tl.constexpr,
                               V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr):
    """Complete what `pair_gradients_kernel` wrote of values: dq_pairs, dp_pairs, dg_pairs and the gradients of value
    keys, all [tokens, HV, K]. A token's own score, the state after the chunk, and the terms `from_vectors` are added.

    `itself` [HV, tokens] are the gradients of A'_ii. One program per chunk and head. It adds to what is there, so
    it must run once: it is not tuned.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside, i, j = t < filled, t[:, None], t[None, :]
    of_key_head, of_head = (first * H + head // (HV // H)) * K, first * HV + head
    q_ptr += of_key_head  # from here on tokens are counted from the chunk's first, in 32 bits
    value_keys_ptr += of_key_head
    at_keys, at_state = of_head * K, (chunk * HV + head) * K * V
    v_ptr += of_head * V
    sums_ptr += at_keys
    itself = tl.load(itself_ptr + head * tokens + first + t, mask=inside, other=0.0)
    itself *= tl.load(factors_ptr + (head * NUM_FACTORS + QUERY_NORM) * tokens + first + t, mask=inside, other=0.0)
    for k0 in tl.range(0, K, BK, disable_licm=True):
        channels = k0 + tl.arange(0, BK)
        n = load_tile(value_keys_ptr, t, H * K, channels, K, inside)
        dq = load_tile(dq_pairs_ptr + at_keys, t, HV * K, channels, K, inside) + itself[:, None] * n
        dq += load_tile(from_vectors_dq_ptr + at_keys, t, HV * K, channels, K, inside)
        store_tile(dq_pairs_ptr + at_keys, t, HV * K, channels, K, inside, dq)
        dp = load_tile(dp_pairs_ptr + at_keys, t, HV * K, channels, K, inside).to(tl.float32)
        dp += load_tile(from_vectors_dp_ptr + at_keys, t, HV * K, channels, K, inside)
        store_tile(dp_pairs_ptr + at_keys, t, HV * K, channels, K, inside, dp)
        q = load_tile(q_ptr, t, H * K, channels, K, inside)
        dn = load_tile(d_value_keys_ptr + at_keys, t, HV * K, channels, K, inside) + itself[:, None] * q
        d_writes = tl.zeros([C, BK], tl.float32)
        for v0 in range(0, V, BV):
            columns = v0 + tl.arange(0, BV)
            v = load_tile(v_ptr, t, HV * V, columns, V, inside)
            dS = load_tile(dS_ptr + at_state, channels, V, columns, V, channels < K)
            d_writes = tl.dot(v, tl.trans(dS), d_writes, input_precision=PRECISION)
        sums = load_sums(sums_ptr, t, HV * K, channels, K, filled)
        end = tl.load(sums_ptr + (filled - 1).to(tl.int64) * HV * K + channels, mask=channels < K, other=0.0)
        d_writes *= tl.exp2((end[None, :] - sums).to(tl.float32))
        store_tile(d_value_keys_ptr + at_keys, t, HV * K, channels, K, inside, dn + d_writes)
        if dg_pairs_ptr is not None:
            dg = sum_over(j < i, n * d_writes, EXACT)
            dg += load_tile(dg_pairs_ptr + at_keys, t, HV * K, channels, K, inside)
            dg += load_tile(from_vectors_dg_ptr + at_keys, t, HV * K, channels, K, inside)
            store_tile(dg_pairs_ptr + at_keys, t, HV * K, channels, K, inside, dg)
