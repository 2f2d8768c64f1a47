"""The quantities of a chunk that do not depend on the state, for every chunk and value head.

With a_t = e^g_t, B = diag(beta), and q, k scaled and normalized:
    A_ij = q_i . (a_{j+1} ... a_i) k_j   for i >= j
    L_ij = k_i . (a_{j+1} ... a_i) k_j   for i > j
    X    = L (I + B L)^-1                by `triton_solve.py`
An erase key p takes the place of k_i in L_ij, and a read before the decay leaves a_i out of it. A free erase vector b
takes the place of k (and B = -I); then a second launch finds the same A and L of the keys at which values are written.
With a decay per channel, pairs of tokens i > j of a chunk meet as in `recurrence/triton_channel_pairs.py`.

Legend: B rows, T tokens per row, H key heads, HV value heads, K key head dim, C = 64 tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_solve import BLOCK, solve
from hybridlm_kernels.recurrence.triton_channel_pairs import channel_scores
from hybridlm_kernels.recurrence.triton_tiles import (
    LOG2_E,
    MIN_LOG2_TOKEN_DECAY,
    C,
    gate_bias,
    gate_rate,
    gate_value,
    load_sums,
    load_tile,
    locate_chunk,
    locate_tokens,
    sigmoid,
    store_tile,
    token_decay_between,
    token_sums,
)
from hybridlm_kernels.triton_support import tuned

# Rows of `factors` [HV, 8, tokens], fp32.
BETA = tl.constexpr(0)
QUERY = tl.constexpr(1)  # scale / |q|, with a scalar decay multiplied from the start of the chunk to the token
KEY = tl.constexpr(2)  # 1 / |k|, likewise
WRITE = tl.constexpr(3)  # 1 / |k|, with a scalar decay multiplied from the token to the end of the chunk
QUERY_NORM = tl.constexpr(4)  # scale / |q|
KEY_NORM = tl.constexpr(5)  # 1 / |k|
COARSE = tl.constexpr(6)  # sums of a scalar decay in log2 units, as `token_sums` gives them
FINE = tl.constexpr(7)
ITSELF = tl.constexpr(6)  # A_ii, with a decay per channel, whose sums are in no row
ITSELF_VALUE = tl.constexpr(7)  # the same of value keys
NUM_FACTORS = tl.constexpr(8)


@triton.jit
def write_strength(beta_ptr, at, inside, beta_scale, SIGMOID: tl.constexpr):
    """Load beta, through its sigmoid with SIGMOID; `beta_scale` without beta, 0 outside."""
    beta = tl.where(inside, beta_scale, 0.0)
    if beta_ptr is not None:  # not an early return, behind which the compiler would still build the rest
        beta = tl.load(beta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SIGMOID:
            beta = tl.where(inside, beta_scale * sigmoid(beta), 0.0)
    return beta


@triton.jit
def store_factors(q_ptr, k_ptr, value_keys_ptr, beta_ptr, factors_ptr, tokens, inside, token, reads, H, HV, scale,
                  beta_scale, K: tl.constexpr, BK: tl.constexpr, CHANNEL: tl.constexpr, L2NORM: tl.constexpr,
                  SIGMOID: tl.constexpr):
    """Write beta and the norms to the factors of a chunk and head; with a decay per channel also the scores A_ii, of
    keys and, if there are any, of value keys, which are used as they are.

    `token` and `reads` are those of `locate_tokens`.
    """
    i = tl.arange(0, C)
    beta = write_strength(beta_ptr, i * HV, inside, beta_scale, SIGMOID)
    tl.store(factors_ptr + BETA * tokens + i, beta, mask=inside)
    q_norm, k_norm, same = tl.full([C], scale, tl.float32), tl.full([C], 1.0, tl.float32), tl.zeros([C], tl.float32)
    same_value = tl.zeros([C], tl.float32)
    if L2NORM or CHANNEL:
        q_squared, k_squared = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        for k0 in range(0, K, BK):
            columns = k0 + tl.arange(0, BK)
            q = load_tile(q_ptr, token, H * K, columns, K, reads).to(tl.float32)
            k = load_tile(k_ptr, i, H * K, columns, K, inside).to(tl.float32)
            if L2NORM:
                q_squared += tl.sum(q * q, axis=1)
                k_squared += tl.sum(k * k, axis=1)
            if CHANNEL:
                same += tl.sum(q * k, axis=1)
                if value_keys_ptr is not None:
                    same_value += tl.sum(q * load_tile(value_keys_ptr, i, H * K, columns, K, inside), axis=1)
        if L2NORM:
            q_norm, k_norm = q_norm * tl.rsqrt(q_squared + 1e-6), tl.rsqrt(k_squared + 1e-6)
    tl.store(factors_ptr + QUERY_NORM * tokens + i, q_norm, mask=inside)
    tl.store(factors_ptr + KEY_NORM * tokens + i, k_norm, mask=inside)
    if CHANNEL:
        tl.store(factors_ptr + ITSELF * tokens + i, same * q_norm * k_norm, mask=inside)
        if value_keys_ptr is not None:
            tl.store(factors_ptr + ITSELF_VALUE * tokens + i, same_value * q_norm, mask=inside)


@triton.jit
def load_sums_before(sums_ptr, tokens, i, inside):
    """The coarse and the fine sum of decays per token before the decay of each token i; `sums_ptr` is the first row."""
    behind = inside & (i > 0)
    return (tl.load(sums_ptr + i - 1, mask=behind, other=0.0),
            tl.load(sums_ptr + tokens + i - 1, mask=behind, other=0.0))


CONFIGS = [triton.Config({"BK": channels}, num_warps=warps, num_stages=stages)
           for channels, warps, stages in ((32, 4, 1), (64, 8, 1), (64, 4, 1), (16, 4, 1))]


@tuned(CONFIGS, ["K", "DECAY", "BEFORE", "STEPS", "MERGED", "CHECKED", "EXACT"])
@triton.jit(do_not_specialize=["tokens"])
def chunk_kernel(q_ptr, p_ptr, k_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, chunks_ptr, A_ptr, L_ptr, X_ptr,
                 factors_ptr, total_ptr, blocks_ptr, sums_ptr, scale, gate_constant, beta_scale, tokens, H, HV,
                 K: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr, L2NORM: tl.constexpr,
                 SIGMOID: tl.constexpr, BEFORE: tl.constexpr, MERGED: tl.constexpr, CHECKED: tl.constexpr,
                 STEPS: tl.constexpr, EXACT: tl.constexpr):
    """Write A, X [tokens, HV, C] and, unless the decay is one per channel, factors [HV, 8, tokens] and total [P, HV].
    Where a token is STEPS rows, `tokens` are rows, but those of q, g and A.

    With a decay per channel the factors and the cumulative sums of log2 decays [tokens, HV, K] are there already.
    `blocks` is memory for the solve, [tokens, HV, 16] in fp32. With L_ptr the keys are value keys: L is written, and
    nothing is solved. Without erase keys p the keys are those. One program per chunk and head.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    i = tl.arange(0, C)
    inside = i < filled
    first_token, token, decays, reads = locate_tokens(first, inside, STEPS)
    of_head, of_key_head = first * HV + head, (first * H + head // (HV // H)) * K
    q_ptr += (first_token * H + head // (HV // H)) * K  # from here on tokens are counted from the chunk's first
    k_ptr += of_key_head
    factors_ptr += head * NUM_FACTORS * tokens + first
    if DECAY != "channel":
        # Gates and norms go through memory, so that threads do not compute them again for every register layout in
        # which they are needed.
        if DECAY == "scalar":
            u = tl.load(g_ptr + first_token * HV + head + token * HV, mask=decays, other=0.0)
            g = gate_value(u, gate_rate(A_log_ptr, head), gate_bias(bias_ptr, head), gate_constant, GATE) * LOG2_E
            g = tl.where(decays, tl.maximum(g, MIN_LOG2_TOKEN_DECAY), 0.0)
            coarse, fine, _, _ = token_sums(g)
            tl.store(factors_ptr + COARSE * tokens + i, coarse, mask=inside)
            tl.store(factors_ptr + FINE * tokens + i, fine, mask=inside)
        store_factors(q_ptr, k_ptr, None, None if beta_ptr is None else beta_ptr + of_head, factors_ptr, tokens, inside,
                      token, reads, H, HV, scale, beta_scale, K, BK, False, L2NORM, SIGMOID)
        tl.debug_barrier()
    else:
        sums_ptr += of_head * K
    A, L = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for k0 in tl.range(0, K, BK, disable_licm=True):
        columns = k0 + tl.arange(0, BK)
        q = load_tile(q_ptr, token, H * K, columns, K, reads)
        k = load_tile(k_ptr, i, H * K, columns, K, inside)
        p = k
        if p_ptr is not None:
            p = load_tile(p_ptr + of_key_head, i, H * K, columns, K, inside)
        if DECAY == "channel":
            sums = load_sums(sums_ptr, i, HV * K, columns, K, filled)
            A, L = channel_scores(q, p, k, sums, sums_ptr, HV * K, columns, K, filled, A, L, True, BEFORE, MERGED,
                                  CHECKED, EXACT)
        else:
            A = tl.dot(q, tl.trans(k), A, input_precision=PRECISION)
            L = tl.dot(p, tl.trans(k), L, input_precision=PRECISION)
    q_norm = tl.load(factors_ptr + QUERY_NORM * tokens + i, mask=inside, other=0.0)
    k_norm = tl.load(factors_ptr + KEY_NORM * tokens + i, mask=inside, other=0.0)
    p_norm = k_norm if p_ptr is None else tl.where(inside, 1.0, 0.0)
    A *= q_norm[:, None] * k_norm[None, :]
    L *= p_norm[:, None] * k_norm[None, :]
    if DECAY == "channel":
        row = ITSELF if L_ptr is None else ITSELF_VALUE
        itself = tl.load(factors_ptr + row * tokens + i, mask=inside, other=0.0)
        A = tl.where(i[:, None] == i[None, :], itself[:, None], A)
    else:
        prefix, suffix = tl.zeros([C], tl.float32) + 1.0, tl.zeros([C], tl.float32) + 1.0
        key_prefix, total = prefix, 1.0
        if DECAY == "scalar":
            sums_ptr = factors_ptr + COARSE * tokens
            coarse = tl.load(sums_ptr + i, mask=inside, other=0.0)
            fine = tl.load(sums_ptr + tokens + i, mask=inside, other=0.0)
            decay = token_decay_between(coarse[:, None], fine[:, None], coarse[None, :], fine[None, :], i[:, None],
                                        i[None, :])
            A *= decay
            last, last_fine = tl.load(sums_ptr + filled - 1), tl.load(sums_ptr + tokens + filled - 1)
            prefix, suffix = tl.exp2(coarse + fine), tl.exp2((last - coarse) + (last_fine - fine))
            total = tl.exp2(last + last_fine)
            key_prefix = prefix
            if BEFORE:
                coarse_before, fine_before = load_sums_before(sums_ptr, tokens, i, inside)
                key_prefix = tl.exp2(coarse_before + fine_before)
                decay = token_decay_between(coarse_before[:, None], fine_before[:, None], coarse[None, :],
                                            fine[None, :], i[:, None], i[None, :])
            L *= decay
        tl.store(factors_ptr + QUERY * tokens + i, q_norm * prefix, mask=inside)
        tl.store(factors_ptr + KEY * tokens + i, p_norm * key_prefix, mask=inside)
        tl.store(factors_ptr + WRITE * tokens + i, k_norm * suffix, mask=inside)
        tl.store(total_ptr + chunk * HV + head, total)
    A = tl.where(i[:, None] >= i[None, :], A, 0.0)
    store_tile(A_ptr + (first_token * HV + head) * C, token, HV * C, i, C, reads, A)
    L = tl.where(i[:, None] > i[None, :], L, 0.0)
    if L_ptr is not None:
        store_tile(L_ptr + of_head * C, i, HV * C, i, C, inside, L)
    else:
        X = solve(L, factors_ptr + BETA * tokens, blocks_ptr + of_head * BLOCK, HV * BLOCK, filled, PRECISION)
        store_tile(X_ptr + of_head * C, i, HV * C, i, C, inside, X)
