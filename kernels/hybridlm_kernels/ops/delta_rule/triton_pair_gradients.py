"""Gradients of what pairs of tokens of a chunk share: of the scores A and L, of values and beta, and with a decay per
channel the terms of dq, dk and dg that come from scores.

With B = diag(beta), Y and Z of `triton_scan.py`:
    dA_ij = dO_i . Y_j beta_j,  dL_ij = -beta_i Z_i . Y_j beta_j,  dbeta_i = Z_i . Y_i,  dV = B Z
With free erase vectors the same of values in place of Y, without beta_j, are the gradients of scores of value keys.
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
    COARSE,
    FINE,
    KEY_NORM,
    NUM_FACTORS,
    QUERY_NORM,
    load_sums_before,
)
from hybridlm_kernels.recurrence.triton_channel_pairs import channel_pair_gradients
from hybridlm_kernels.recurrence.triton_tiles import (
    C,
    load_sums,
    load_tile,
    locate_chunk,
    locate_tokens,
    store_mirrored,
    store_tile,
    token_decay_between,
)
from hybridlm_kernels.triton_support import tuned


@triton.jit
def score_gradients(do_ptr, y_ptr, z_ptr, dv_ptr, d_beta_ptr, MA_ptr, ML_ptr, factors_ptr, filled, token, reads,
                    tokens, HV, beta_scale, V: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, OWN: tl.constexpr,
                    BEFORE: tl.constexpr, VALUE_KEYS: tl.constexpr, SIGMOID: tl.constexpr, EXACT: tl.constexpr):
    """Write dV = B Z and d_beta, unless they are None, and MA and ML, the gradients of the queries' and the keys'
    scores, with all factors of the products of q and k.

    MA and ML stand below the diagonal, with a decay per channel also mirrored above it, where else nothing is but 0.
    The result is that of A_ii: like d_beta it is the diagonal of a product that is there anyway. VALUE_KEYS says that
    `y_ptr` holds values, which are written without beta. `token` and `reads` as in `locate_tokens`.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    t = tl.arange(0, C)
    inside, i, j = t < filled, t[:, None], t[None, :]
    beta = tl.load(factors_ptr + BETA * tokens + t, mask=inside, other=0.0)
    key_norm = tl.load(factors_ptr + KEY_NORM * tokens + t, mask=inside, other=0.0)
    query_norm = tl.load(factors_ptr + QUERY_NORM * tokens + t, mask=inside, other=0.0)
    MA, ML = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        do = load_tile(do_ptr, token, HV * V, columns, V, reads)  # all loads are under way before the first product
        y = load_tile(y_ptr, t, HV * V, columns, V, inside)
        z = load_tile(z_ptr, t, HV * V, columns, V, inside)
        MA = tl.dot(do, tl.trans(y), MA, input_precision=PRECISION)
        ML = tl.dot(z, tl.trans(y), ML, input_precision=PRECISION)
        if dv_ptr is not None:
            store_tile(dv_ptr, t, HV * V, columns, V, inside, beta[:, None] * z.to(tl.float32))
    itself = tl.sum(tl.where(i == j, MA, 0.0), axis=1)
    if d_beta_ptr is not None:
        d_beta = tl.sum(tl.where(i == j, ML, 0.0), axis=1)
        if SIGMOID:
            d_beta *= beta * (1.0 - beta / beta_scale)
        tl.store(d_beta_ptr + t * HV, d_beta.to(d_beta_ptr.dtype.element_ty), mask=inside)
    of_rows, of_columns = beta if OWN else beta * key_norm, key_norm if VALUE_KEYS else beta * key_norm
    if DECAY == "scalar":
        coarse = tl.load(factors_ptr + COARSE * tokens + t, mask=inside, other=0.0)
        fine = tl.load(factors_ptr + FINE * tokens + t, mask=inside, other=0.0)
        D = token_decay_between(coarse[:, None], fine[:, None], coarse[None, :], fine[None, :], i, j)
        MA *= D
        if BEFORE:
            before, fine_before = load_sums_before(factors_ptr + COARSE * tokens, tokens, t, inside)
            D = token_decay_between(before[:, None], fine_before[:, None], coarse[None, :], fine[None, :], i, j)
        ML *= D
    MA = tl.where(i > j, MA * query_norm[:, None] * of_columns[None, :], 0.0)
    ML = tl.where(i > j, ML * -of_rows[:, None] * of_columns[None, :], 0.0)
    if DECAY == "channel":
        store_mirrored(MA_ptr, HV * C, t, filled, MA)
        store_mirrored(ML_ptr, HV * C, t, filled, ML)
    else:
        store_tile(MA_ptr, t, HV * C, t, C, inside, MA)
        store_tile(ML_ptr, t, HV * C, t, C, inside, ML)
    return itself


@triton.jit
def own_pair_gradients(q_ptr, p_ptr, k_ptr, sums_ptr, M_ptr, to_ML, dq_ptr, dp_ptr, dk_ptr, dg_ptr, filled, token,
                       reads, H, HV, K: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, MERGED: tl.constexpr,
                       EXACT: tl.constexpr):
    """Write the terms of dq, dp, dk and, unless None, dg that come from pairs, of queries and erase keys p.

    Queries and erase keys take turns, since both at once would not fit the registers. ML lies `to_ML` behind MA, which
    is `M_ptr`; dk and dg of the first turn are read in the second.
    """
    t = tl.arange(0, C)
    inside = t < filled
    for turn in tl.range(0, 2, num_stages=1, disable_licm=True, loop_unroll_factor=1):
        of_queries, of_erase_keys = reads & (turn == 0), inside & (turn == 1)
        for k0 in tl.range(0, K, BK, disable_licm=True):  # masks of [C, C] would fill the registers
            channels = k0 + tl.arange(0, BK)
            sums = load_sums(sums_ptr, t, HV * K, channels, K, filled)
            x = load_tile(q_ptr, token, H * K, channels, K, of_queries)
            x += load_tile(p_ptr, t, H * K, channels, K, of_erase_keys)
            k = load_tile(k_ptr, t, H * K, channels, K, inside)
            dx, dk, dg = channel_pair_gradients(x, k, sums, sums_ptr, HV * K, channels, K, M_ptr + turn * to_ML, None,
                                                HV * C, filled, False, BEFORE, MERGED, EXACT, turn)
            store_tile(dq_ptr, token, HV * K, channels, K, of_queries, dx)
            store_tile(dp_ptr, t, HV * K, channels, K, of_erase_keys, dx)
            dk += load_tile(dk_ptr, t, HV * K, channels, K, of_erase_keys)
            store_tile(dk_ptr, t, HV * K, channels, K, inside, dk)
            if dg_ptr is not None:
                dg += load_tile(dg_ptr, t, HV * K, channels, K, of_erase_keys)
                store_tile(dg_ptr, t, HV * K, channels, K, inside, dg)
        tl.debug_barrier()


CONFIGS = [triton.Config({"BK": channels, "BV": values}, num_warps=warps, num_stages=stages)
           for channels, values, warps, stages in ((32, 64, 8, 1), (16, 64, 8, 1), (32, 32, 8, 1), (64, 64, 8, 1),
                                                   (32, 32, 4, 1))]


@tuned(CONFIGS, ["K", "V", "OWN", "VALUE_KEYS", "BEFORE", "STEPS", "MERGED", "EXACT"])
@triton.jit(do_not_specialize=["tokens"])
def pair_gradients_kernel(q_ptr, p_ptr, k_ptr, do_ptr, y_ptr, z_ptr, factors_ptr, sums_ptr, chunks_ptr, scratch_ptr,
                          dq_pairs_ptr, dp_pairs_ptr, dk_pairs_ptr, dg_pairs_ptr, dv_ptr, d_beta_ptr, itself_ptr,
                          beta_scale, tokens, H, HV, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                          BV: tl.constexpr, SIGMOID: tl.constexpr, OWN: tl.constexpr, VALUE_KEYS: tl.constexpr,
                          BEFORE: tl.constexpr, STEPS: tl.constexpr, MERGED: tl.constexpr, EXACT: tl.constexpr):
    """Write the terms of dq, dk, dg [tokens, HV, K] that come from pairs of tokens, dv [tokens, HV, V], d_beta
    [tokens, HV] and the gradients of A_ii, itself [HV, tokens] in fp32; with OWN, erase keys p, terms of dp, too.

    `scratch` is [2, tokens, HV, C]. Where a token is STEPS rows, `tokens` are rows, but those of q, do and dq. With
    VALUE_KEYS the pairs are those of values `y` at keys `k`, without beta. One program per chunk and head.
    """
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside = t < filled
    first_token, token, _, reads = locate_tokens(first, inside, STEPS)
    of_key_head, of_head = first * H + head // (HV // H), first * HV + head
    q_ptr += (first_token * H + head // (HV // H)) * K  # from here on tokens are counted from the chunk's first
    k_ptr += of_key_head * K
    dq_pairs_ptr += (first_token * HV + head) * K
    dk_pairs_ptr += of_head * K
    sums_ptr += of_head * K
    do_ptr += (first_token * HV + head) * V
    y_ptr += of_head * V
    z_ptr += of_head * V
    factors_ptr += head * NUM_FACTORS * tokens + first
    MA_ptr = scratch_ptr + of_head * C
    ML_ptr = MA_ptr + (chunk - chunk + HV) * tokens * C  # in 64 bits
    itself = score_gradients(do_ptr, y_ptr, z_ptr, None if dv_ptr is None else dv_ptr + of_head * V,
                             None if d_beta_ptr is None else d_beta_ptr + of_head, MA_ptr, ML_ptr, factors_ptr,
                             filled, token, reads, tokens, HV, beta_scale, V, BV, "channel", OWN, BEFORE,
                             VALUE_KEYS, SIGMOID, EXACT)
    tl.store(itself_ptr + head * tokens + first + t, itself, mask=inside)
    tl.debug_barrier()  # what other threads of the program wrote is read from here on
    if OWN:
        own_pair_gradients(q_ptr, p_ptr + of_key_head * K, k_ptr, sums_ptr, MA_ptr, (chunk - chunk + HV) * tokens * C,
                           dq_pairs_ptr, dp_pairs_ptr + of_head * K, dk_pairs_ptr,
                           None if dg_pairs_ptr is None else dg_pairs_ptr + of_head * K, filled, token, reads, H, HV, K,
                           BK, BEFORE, MERGED, EXACT)
    else:
        for k0 in tl.range(0, K, BK, disable_licm=True):  # masks of [C, C] would fill the registers
            channels = k0 + tl.arange(0, BK)
            sums = load_sums(sums_ptr, t, HV * K, channels, K, filled)
            q = load_tile(q_ptr, token, H * K, channels, K, reads)
            k = load_tile(k_ptr, t, H * K, channels, K, inside)
            dq, dk, dg = channel_pair_gradients(q, k, sums, sums_ptr, HV * K, channels, K, MA_ptr, ML_ptr, HV * C,
                                                filled, True, BEFORE, MERGED, EXACT)
            store_tile(dq_pairs_ptr, token, HV * K, channels, K, reads, dq)
            store_tile(dk_pairs_ptr, t, HV * K, channels, K, inside, dk)
            if dg_pairs_ptr is not None:
                store_tile(dg_pairs_ptr + of_head * K, t, HV * K, channels, K, inside, dg)
