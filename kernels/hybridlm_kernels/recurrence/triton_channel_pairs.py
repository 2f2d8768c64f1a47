"""Pairs of tokens of a chunk under a decay per channel: their scores, and the gradients of the scores' operands.

Pairs meet by levels (`triton_tiles.py`), where no exponent is positive. Those within blocks of 2^MERGED tokens meet in
one product instead where decays are weak enough:
    a_{j+1} ... a_i = 2^{E_i + c} 2^{-E_j - c},  E = sum of log2 decays from the block's start,  c = MAX_EXPONENT
as long as E is at least -2c.

Legend: C = 64 tokens per chunk, K key head dim, i, j, t tokens of a chunk.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hybridlm_kernels.recurrence.gates import Gate
from hybridlm_kernels.recurrence.triton_tiles import (
    LEVELS,
    MAX_EXPONENT,
    C,
    border_decay,
    decay_from_start,
    lies_between,
    load_sums,
    load_tile,
    meet,
    meets_border,
    second_half,
    sum_over,
    times,
)

# Levels of the pairs that one product takes where decays are weak enough.
CHECKED_LEVELS = 5
# Fewer levels, known to be safe from the gate's bound, are not worth to do without the check.
MIN_BOUNDED_LEVELS = 4


def merged_levels(gate: Gate | None, dtype: torch.dtype) -> tuple[int, bool]:
    """Levels of pairs of a chunk that one product takes, MERGED, and whether kernels check that they may, CHECKED.

    Where the gate's bound keeps every exponent within MAX_EXPONENT, whatever the gate's input, no check is needed. fp16
    has no room for such exponents, and float32 would lose digits by them.
    """
    if dtype != torch.bfloat16:
        return 0, False
    if gate is not None and gate.kind == "lower_bounded":
        tokens = 2 * MAX_EXPONENT.value / (-gate.lower_bound * math.log2(math.e))  # in a block
        levels = min(int(LEVELS.value), math.floor(math.log2(tokens))) if tokens >= 1 else 0
        if levels >= MIN_BOUNDED_LEVELS:
            return levels, False
    return CHECKED_LEVELS, True


@triton.jit
def before_decay(sums_ptr, stride, columns, K: tl.constexpr, filled, b):
    """The decays of `border_decay` without that of the token itself, of tokens behind the border."""
    sums_before = load_sums(sums_ptr, tl.arange(0, C) - 1, stride, columns, K, filled)
    return border_decay(sums_before, sums_ptr, stride, columns, K, filled, b)


@triton.jit
def before_decay_from_start(sums_ptr, stride, columns, K: tl.constexpr, filled, LEVELS_MERGED: tl.constexpr, before=1):
    """The log2 decays of `decay_from_start` without those of the tokens themselves, with them where `before` is 0.

    At a block's first token they are 0.
    """
    sums_before = load_sums(sums_ptr, tl.arange(0, C) - before, stride, columns, K, filled)
    return tl.minimum(decay_from_start(sums_before, sums_ptr, stride, columns, K, filled, LEVELS_MERGED), 0.0)


@triton.jit
def channel_scores(q, p, k, sums, sums_ptr, stride, columns, K: tl.constexpr, filled, A, L, ERASE: tl.constexpr,
                   BEFORE: tl.constexpr, MERGED: tl.constexpr, CHECKED: tl.constexpr, EXACT: tl.constexpr):
    """Add x_i . (a_{j+1} ... a_i) k_j of some channels for all pairs i > j, of x = q to A and with ERASE of x = p to L.

    With BEFORE a_i is left out of L: p reads before the decay of its token. A row takes its pairs in one product where
    E is at least -2c in all channels, which needs no look where gates are bounded (not CHECKED), else by levels. What a
    row takes depends on the tokens up to it alone.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    t = tl.arange(0, C)
    first_level = MERGED
    by_levels = t < 0
    if MERGED > 0:
        E = decay_from_start(sums, sums_ptr, stride, columns, K, filled, MERGED)
        keys = tl.trans(times(k, tl.exp2(-(E + MAX_EXPONENT))))
        decay = tl.exp2(E + MAX_EXPONENT)
        pairs = (t[:, None] > t[None, :]) & ((t[:, None] ^ t[None, :]) < (1 << MERGED))
        if CHECKED:
            by_levels = tl.min(E, axis=1) < -2 * MAX_EXPONENT
            pairs &= (by_levels == 0)[:, None]
            first_level = tl.where(tl.max(by_levels.to(tl.int32)) > 0, 0, MERGED)
        A = tl.where(pairs, A + tl.dot(times(q, decay), keys, input_precision=PRECISION), A)
        if ERASE:
            p_decay = decay
            if BEFORE:
                before = before_decay_from_start(sums_ptr, stride, columns, K, filled, MERGED)
                p_decay = tl.exp2(before + MAX_EXPONENT)
            L = tl.where(pairs, L + tl.dot(times(p, p_decay), keys, input_precision=PRECISION), L)
    for e in tl.range(first_level, LEVELS, num_stages=1, disable_licm=True):
        to_border = border_decay(sums, sums_ptr, stride, columns, K, filled, 1 << e)
        half = times(k, to_border)
        meets = meets_border(1 << e)
        if MERGED > 0 and CHECKED:
            meets &= (by_levels | (e >= MERGED))[:, None]
        A = tl.where(meets, A + tl.dot(times(q, to_border), tl.trans(half), input_precision=PRECISION), A)
        if ERASE:
            p_to_border = to_border
            if BEFORE:
                p_to_border = before_decay(sums_ptr, stride, columns, K, filled, 1 << e)
            L = tl.where(meets, L + tl.dot(times(p, p_to_border), tl.trans(half), input_precision=PRECISION), L)
    return A, L


@triton.jit
def channel_pair_gradients(q, k, sums, sums_ptr, sums_stride, columns, K: tl.constexpr, MA_ptr, ML_ptr, stride, filled,
                           ERASE: tl.constexpr, BEFORE: tl.constexpr, MERGED: tl.constexpr, EXACT: tl.constexpr,
                           before=1):
    """The terms of dq, dk and dg [C, channels] from pairs of tokens, given the mirrored gradients of the scores.

    BEFORE leaves the decay of a row's own token out: with ERASE in the rows of L, else in those of A where `before`
    is 1, and not where it is 0.

    Pairs meet as in `channel_scores`, but for all rows alike. A decay t is a factor of the pair (i, j) when j < t <= i,
    so of pairs that meet at a border it gets those on its own side with the farther end behind it. Where pairs meet in
    one product, it gets the pairs with the later end behind it less those with the earlier end behind it, too. Both are
    products of the same rounded numbers: what one pair adds and takes away cancels.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    Q_BEFORE: tl.constexpr = BEFORE and not ERASE
    t = tl.arange(0, C)
    inside, i, j = t < filled, t[:, None], t[None, :]
    dq, dk = tl.zeros(sums.shape, tl.float32), tl.zeros(sums.shape, tl.float32)
    dg = tl.zeros(sums.shape, tl.float32)
    first_level = MERGED
    KEEP: tl.constexpr = not ERASE and not BEFORE
    if MERGED > 0 or KEEP:
        MA = load_tile(MA_ptr, t, stride, t, C, inside)  # under way while decays are found
    if MERGED > 0 and ERASE:
        ML = load_tile(ML_ptr, t, stride, t, C, inside)
    if MERGED > 0:
        E = decay_from_start(sums, sums_ptr, sums_stride, columns, K, filled, MERGED)
        first_level = tl.where(tl.min(E) < -2 * MAX_EXPONENT, 0, MERGED)
        if first_level == MERGED:
            decay, inverse = tl.exp2(E + MAX_EXPONENT), tl.exp2(-(E + MAX_EXPONENT))
            x_decay = decay
            if BEFORE:
                own_E = before_decay_from_start(sums_ptr, sums_stride, columns, K, filled, MERGED, before)
                x_decay = tl.exp2(own_E + MAX_EXPONENT)
            q_decay = x_decay if Q_BEFORE else decay
            queries, first_keys = times(q, q_decay), times(k, inverse)
            block = (i ^ j) < (1 << MERGED)
            for_queries = tl.dot(tl.where(block & (i > j), MA, 0.0).to(q.dtype), first_keys, input_precision=PRECISION)
            back = tl.dot(tl.where(block & (i < j), MA, 0.0).to(q.dtype), queries, input_precision=PRECISION)
            dq = for_queries * q_decay
            changes = queries * for_queries
            if ERASE:
                keys = times(k, x_decay)
                for_keys = tl.dot(tl.where(block & (i > j), ML, 0.0).to(q.dtype), first_keys, input_precision=PRECISION)
                back = tl.dot(tl.where(block & (i < j), ML, 0.0).to(q.dtype), keys, back, input_precision=PRECISION)
                dk = for_keys * x_decay
                if BEFORE:
                    dg = sum_over(j > i, keys * for_keys, EXACT)
                else:
                    changes += keys * for_keys
            dk += back * inverse
            if Q_BEFORE:
                dg = sum_over(j >= i + before, changes, EXACT) - sum_over(j >= i, first_keys * back, EXACT)
            else:
                dg += sum_over(j >= i, changes - first_keys * back, EXACT)
    for e in tl.range(first_level, LEVELS, num_stages=1, disable_licm=True, loop_unroll_factor=1):
        b = 1 << e
        if KEEP:
            of_queries = MA
        else:  # loaded again, since it would not stay in the registers
            of_queries = load_tile(MA_ptr, t, stride, t, C, inside)
        if ERASE:
            of_keys = load_tile(ML_ptr, t, stride, t, C, inside)
        second = second_half(i, b)
        own_sums = sums
        if Q_BEFORE:
            own_sums = tl.where(second, load_sums(sums_ptr, t - before, sums_stride, columns, K, filled), sums)
        to_border = border_decay(own_sums, sums_ptr, sums_stride, columns, K, filled, b)
        partner = times(tl.where(second, q, k), to_border)
        of_queries = tl.where(meet(i, j, b), of_queries, 0.0).to(q.dtype)
        across = tl.dot(of_queries, partner, input_precision=PRECISION)
        dq += tl.where(second, across * to_border, 0.0)
        for_keys = tl.where(second, 0.0, across)
        changes = partner * across
        if ERASE:
            x_decay = to_border
            if BEFORE:
                x_decay = tl.where(second, before_decay(sums_ptr, sums_stride, columns, K, filled, b), to_border)
            own_keys = times(k, x_decay)
            of_keys = tl.where(meet(i, j, b), of_keys, 0.0).to(q.dtype)
            own = tl.dot(of_keys, own_keys, input_precision=PRECISION)
            if BEFORE:
                dk += own * x_decay
                dg += sum_over(lies_between(j, i, b, 1), own_keys * own, EXACT)
            else:
                for_keys += own
                changes += own_keys * own
        dk += for_keys * to_border
        if Q_BEFORE:
            dg += sum_over(lies_between(j, i, b, before), changes, EXACT)
        else:
            dg += sum_over(lies_between(j, i, b), changes, EXACT)
    return dq, dk, dg
