"""The quantities of a chunk that do not depend on the state, for every chunk and value head.

With a_t = e^g_t, B = diag(beta), and q, k scaled and normalized:
    A_ij = q_i . (a_{j+1} ... a_i) k_j   for i >= j
    L_ij = k_i . (a_{j+1} ... a_i) k_j   for i > j
    X    = L (I + B L)^-1                solves Y = R - L B Y as Y = R - X B R
X is kept rather than the inverse (I + B L)^-1, so that rounding touches its product alone and not the identity, and
beta = 0 needs no special case.

Legend: B rows, T tokens per row, H key heads, HV value heads, K key head dim, C = 64 tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_tiles import (
    LEVELS,
    LOG2_E,
    C,
    decay_between,
    gate_bias,
    gate_rate,
    gate_value,
    lies_between,
    load_gates,
    load_tile,
    log2_decay,
    pairs_of,
    sigmoid,
    store_tile,
    sum_over,
)
from hybridlm_kernels.triton_support import tuned

# Rows of `factors` [HV, 7, tokens], fp32.
BETA = tl.constexpr(0)
QUERY = tl.constexpr(1)  # scale / |q|, with a scalar decay multiplied from the start of the chunk to the token
KEY = tl.constexpr(2)  # 1 / |k|, likewise
WRITE = tl.constexpr(3)  # 1 / |k|, with a scalar decay multiplied from the token to the end of the chunk
QUERY_NORM = tl.constexpr(4)  # scale / |q|
KEY_NORM = tl.constexpr(5)  # 1 / |k|
DECAY_LOG2 = tl.constexpr(6)  # g in log2 units, of a scalar decay
NUM_FACTORS = tl.constexpr(7)


@triton.jit
def _solve(L, beta_ptr, filled, PRECISION: tl.constexpr):
    """Solve for X = L (I + B L)^-1 [C, C]: row after row in diagonal blocks of 16, then the blocks are joined."""
    N: tl.constexpr = C // 16
    n, r = tl.arange(0, N), tl.arange(0, 16)
    at = n[:, None] * 16 + r[None, :]
    beta_blocks = tl.load(beta_ptr + at, mask=at < filled, other=0.0)
    beta = tl.load(beta_ptr + tl.arange(0, C), mask=tl.arange(0, C) < filled, other=0.0)
    diagonal = (n[:, None] == n[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(diagonal, tl.reshape(L, (N, 16, N, 16)), 0.0), axis=2)  # [N, 16, 16]
    scaled = blocks * beta_blocks[:, None, :]
    for i in range(1, 16):
        at_i = (r == i)[None, :, None]
        row = tl.sum(tl.where(at_i, scaled, 0.0), axis=1)  # [N, 16]
        through = tl.sum(row[:, :, None] * blocks, axis=1)
        blocks = tl.where(at_i, blocks - through[:, None, :], blocks)
    X = tl.reshape(tl.where(diagonal, blocks[:, :, None, :], 0.0), (C, C))
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for e in tl.static_range(4, LEVELS):
        corner = tl.where(pairs_of(row, column, 1 << e), L, 0.0)
        corner -= tl.dot(corner * beta[None, :], X, input_precision=PRECISION)
        X += corner - tl.dot(X * beta[None, :], corner, input_precision=PRECISION)
    return X


@triton.jit
def write_strength(beta_ptr, at, inside, beta_scale, SIGMOID: tl.constexpr):
    """Load beta, through its sigmoid with SIGMOID; 1 without beta, 0 outside."""
    beta = tl.where(inside, 1.0, 0.0)
    if beta_ptr is not None:  # not an early return, behind which the compiler would still build the rest
        beta = tl.load(beta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SIGMOID:
            beta = tl.where(inside, beta_scale * sigmoid(beta), 0.0)
    return beta


@triton.jit
def _channel_scores(x, k, g, scores, MERGED: tl.constexpr, EXACT: tl.constexpr):
    """Add x_i . (a_{j+1} ... a_i) k_j of some channels to the scores, for all pairs i > j.

    Pairs within blocks of 2^MERGED tokens meet in one product: a_{j+1} ... a_i = 2^{E_i} 2^{-E_j}, with E the sum of g
    from the block's middle to a token, below 0 behind it and above 0 before. Where MERGED is 0 no exponent is positive.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if MERGED > 0:
        middle = (i & -(1 << MERGED)) + (1 << MERGED) // 2
        behind, before = (j >= middle) & (j <= i), (j > i) & (j < middle)
        E = sum_over(behind.to(tl.int8) - before.to(tl.int8), g, EXACT)
        product = tl.dot((x * tl.exp2(E)).to(x.dtype), tl.trans((k * tl.exp2(-E)).to(k.dtype)),
                         input_precision=PRECISION)
        scores = tl.where((i > j) & ((i ^ j) < (1 << MERGED)), scores + product, scores)
    for e in tl.range(MERGED, LEVELS, num_stages=1, disable_licm=True):
        b = 1 << e
        factor = tl.exp2(sum_over(lies_between(i, j, b), g, EXACT))
        product = tl.dot((x * factor).to(x.dtype), tl.trans((k * factor).to(k.dtype)), input_precision=PRECISION)
        scores = tl.where(pairs_of(i, j, b), scores + product, scores)
    return scores


@triton.jit
def prepare(q_ptr, k_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, A_ptr, X_ptr, factors_ptr, total_ptr, queries_ptr,
            keys_ptr, writes_ptr, to_stride, scale, gate_constant, beta_scale, tokens, H, HV, chunk, head,
            first, filled, of_keys, K: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
            L2NORM: tl.constexpr, SIGMOID: tl.constexpr, SCORES: tl.constexpr, MERGED: tl.constexpr,
            EXACT: tl.constexpr):
    """Write what `chunk_kernel` writes for one chunk and head, the part of the keys (`of_keys`) or of the queries.

    The pointers of the decayed queries, keys and writes are those of the head and of the chunk's first token.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    i = tl.arange(0, C)
    inside = i < filled
    of_head, of_key_head = first * HV + head, (first * H + head // (HV // H)) * K
    k_ptr += of_key_head  # from here on tokens are counted from the chunk's first, in 32 bits
    x_ptr = k_ptr if of_keys else q_ptr + of_key_head
    factors_ptr += head * NUM_FACTORS * tokens + first
    lower, strict = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    rate = gate_rate(A_log_ptr, head)
    if SCORES:
        # Gates go through memory, so that threads do not compute them again for every register layout in which they
        # are needed. Both programs write the same numbers.
        beta = write_strength(beta_ptr, of_head + i * HV, inside, beta_scale, SIGMOID)
        tl.store(factors_ptr + BETA * tokens + i, beta, mask=inside)
        if DECAY == "scalar":
            u = tl.load(g_ptr + of_head + i * HV, mask=inside, other=0.0)
            g = gate_value(u, rate, gate_bias(bias_ptr, head), gate_constant, GATE) * LOG2_E
            tl.store(factors_ptr + DECAY_LOG2 * tokens + i, g, mask=inside)
        tl.debug_barrier()
    x_norm, k_norm = tl.zeros([C], tl.float32) + 1.0, tl.zeros([C], tl.float32) + 1.0
    if L2NORM:
        x_squared, k_squared = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        for k0 in range(0, K, BK):
            columns = k0 + tl.arange(0, BK)
            x = load_tile(x_ptr, i, H * K, columns, K, inside).to(tl.float32)
            k = load_tile(k_ptr, i, H * K, columns, K, inside).to(tl.float32)
            x_squared += tl.sum(x * x, axis=1)
            k_squared += tl.sum(k * k, axis=1)
        x_norm, k_norm = tl.rsqrt(x_squared + 1e-6), tl.rsqrt(k_squared + 1e-6)
    x_norm *= tl.where(of_keys, 1.0, scale)
    scores, same = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for k0 in tl.range(0, K, BK, disable_licm=True):
        columns = k0 + tl.arange(0, BK)
        x = load_tile(x_ptr, i, H * K, columns, K, inside)
        k = load_tile(k_ptr, i, H * K, columns, K, inside)
        if DECAY == "channel":
            u, bias = load_gates(g_ptr + of_head * K, None if bias_ptr is None else bias_ptr + head * K, i, HV * K,
                                 columns, K, inside)
            g = log2_decay(u, rate, bias, gate_constant, inside, GATE)
            decayed = x * (tl.exp2(sum_over(lower, g, EXACT)) * x_norm[:, None])
            store_tile(keys_ptr if of_keys else queries_ptr, i, to_stride, columns, K, inside, decayed)
            if of_keys:
                to_end = tl.exp2(sum_over(lower == 0, g, EXACT))
                store_tile(writes_ptr, i, to_stride, columns, K, inside, k * (to_end * k_norm[:, None]))
            if SCORES:
                if of_keys:
                    total = tl.exp2(tl.sum(g, axis=0))
                    tl.store(total_ptr + (chunk * HV + head) * K + columns, total, mask=columns < K)
                same += tl.sum(x.to(tl.float32) * k.to(tl.float32), axis=1)
                scores = _channel_scores(x, k, g, scores, MERGED, EXACT)
        else:
            scores = tl.dot(x, tl.trans(k), scores, input_precision=PRECISION)
    if SCORES:
        scores *= x_norm[:, None] * k_norm[None, :]
        tl.store(factors_ptr + tl.where(of_keys, KEY_NORM, QUERY_NORM) * tokens + i, x_norm, mask=inside)
        if DECAY == "channel":
            scores = tl.where(i[:, None] == i[None, :], (same * x_norm * k_norm)[:, None], scores)
        else:
            prefix, suffix = tl.zeros([C], tl.float32) + 1.0, tl.zeros([C], tl.float32) + 1.0
            total = 1.0
            if DECAY == "scalar":
                at_g = factors_ptr + DECAY_LOG2 * tokens + i
                g, g_next = tl.load(at_g, mask=inside, other=0.0), tl.load(at_g + 1, mask=i + 1 < filled, other=0.0)
                scores *= decay_between(g, i[None, :], EXACT)
                prefix, suffix = tl.exp2(tl.cumsum(g, axis=0)), tl.exp2(tl.cumsum(g_next, axis=0, reverse=True))
                total = tl.exp2(tl.sum(g, axis=0))
            tl.store(factors_ptr + tl.where(of_keys, KEY, QUERY) * tokens + i, x_norm * prefix, mask=inside)
            if of_keys:
                tl.store(total_ptr + chunk * HV + head, total)
                tl.store(factors_ptr + WRITE * tokens + i, x_norm * suffix, mask=inside)
        if of_keys:
            X = _solve(tl.where(strict, scores, 0.0), factors_ptr + BETA * tokens, filled, PRECISION)
            store_tile(X_ptr + of_head * C, i, HV * C, i, C, inside, X)
        else:
            store_tile(A_ptr + of_head * C, i, HV * C, i, C, inside, tl.where(lower, scores, 0.0))


CONFIGS = [triton.Config({"BK": channels}, num_warps=warps, num_stages=stages)
           for channels, warps, stages in ((16, 8, 1), (16, 4, 1), (32, 4, 1), (32, 4, 2), (64, 8, 1))]


@tuned(CONFIGS, ["K", "DECAY", "SCORES", "MERGED", "EXACT"])
@triton.jit
def chunk_kernel(q_ptr, k_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, chunks_ptr, A_ptr, X_ptr, factors_ptr, total_ptr,
                 queries_ptr, keys_ptr, writes_ptr, scale, gate_constant, beta_scale, tokens, H, HV, K: tl.constexpr,
                 BK: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr, L2NORM: tl.constexpr,
                 SIGMOID: tl.constexpr, SCORES: tl.constexpr, MERGED: tl.constexpr, EXACT: tl.constexpr):
    """Write A, X [tokens, HV, C], factors [HV, 7, tokens] and total [P, HV(, K)]; with a decay per channel also the
    decayed queries, keys and writes [tokens, HV, K]. Without SCORES write only these last three.

    Two programs per chunk and head: one for the queries, one for the keys.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, filled = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    if DECAY == "channel":
        queries_ptr += (first * HV + head) * K
        keys_ptr += (first * HV + head) * K
        writes_ptr += (first * HV + head) * K
    prepare(q_ptr, k_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, A_ptr, X_ptr, factors_ptr, total_ptr, queries_ptr,
            keys_ptr, writes_ptr, HV * K, scale, gate_constant, beta_scale, tokens, H, HV, chunk,
            head, first, filled, tl.program_id(2) == 1, K, BK, DECAY, GATE, L2NORM, SIGMOID, SCORES, MERGED, EXACT)
