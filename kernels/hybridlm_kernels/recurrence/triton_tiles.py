"""Building blocks of the recurrences' Triton kernels: tiles of heads, gates, sums of decays, pairs of tokens.

Decays are in log2 units. Either they are only added (`sum_over`), or their sums up to each token are kept with so many
digits that differences of sums keep those of a weak decay behind a strong one (`token_sums`, `cumulative_sums`). In
both ways exponents are at most 0 and exp2 lies in [0, 1], whatever the gate. The exception are products of pairs within
blocks of tokens, where decays are weak enough for exponents of either sign (`triton_channel_pairs.py`).

With a decay per channel, pairs of tokens i > j of a chunk are taken by levels b = 1, 2, 4, ..., C/2. Blocks of 2b
tokens have a border between their halves; i in the second half and j in the first meet there:
    a_{j+1} ... a_i = 2^{E_i} 2^{E_j},  E_i = sum of g from the border to i,  E_j = sum from behind j to the border.

Legend: C = 64 tokens per chunk, K key head dim, i, j, t tokens of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

C = tl.constexpr(64)
LEVELS = tl.constexpr(6)  # b = 1, 2, ..., C/2
LOG2_E = tl.constexpr(1.4426950408889634)
# Lower limit of log2 decays that are summed by matrix products: 2^-200 is 0 in fp32, and 0 * -inf would be NaN.
MIN_LOG2_DECAY = tl.constexpr(-200.0)
# The same for a decay per token, whose sums are no matrix products.
MIN_LOG2_TOKEN_DECAY = tl.constexpr(-1000.0)
# Largest exponent of 2, of either sign, in products of pairs that meet at once; bf16 and fp32 go to 127.
MAX_EXPONENT = tl.constexpr(60.0)
# Coarse decays per token are multiples of 1 / COARSE_STEPS: 64 of them, none below the limit, add exactly in fp32.
COARSE_STEPS = tl.constexpr(256.0)


@triton.jit
def locate_chunk(chunks_ptr):
    """Find the chunk and the head of a program in a grid of both, the chunk's first token, and its number of tokens."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    return chunk, head, tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int32)


@triton.jit
def locate_tokens(first, inside, STEPS: tl.constexpr):
    """Find the tokens of the rows [C] of the chunk that starts at row `first`, STEPS rows per token (DeltaProduct).

    Returns the first row's token, the token of every row counted from it, and the rows inside at which the token decays
    and at which its query reads: its first row and its last.
    """
    if STEPS == 1:
        return first, tl.arange(0, C), inside, inside
    else:
        row = tl.cast(first % STEPS, tl.int32) + tl.arange(0, C)
        return first // STEPS, row // STEPS, inside & (row % STEPS == 0), inside & (row % STEPS == STEPS - 1)


@triton.jit
def load_tile(ptr, rows, stride, columns, WIDTH: tl.constexpr, inside):
    """Load the tile [rows, columns] of the head that `ptr` points to, zero outside."""
    at = rows[:, None] * stride + columns[None, :]
    return tl.load(ptr + at, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, rows, stride, columns, WIDTH: tl.constexpr, inside, x):
    """Store a tile where `load_tile` loads it, in the dtype of the memory."""
    at = rows[:, None] * stride + columns[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def times(x, factor):
    """The product of x and a factor of float32, in the type of x."""
    return (x * factor).to(x.dtype)


@triton.jit
def store_mirrored(ptr, stride, columns, filled, x):
    """Store columns x [C, columns] of a chunk's scores, 0 on and above the diagonal, below it and mirrored above it."""
    t = tl.arange(0, C)
    half = x.to(ptr.dtype.element_ty)
    tl.store(ptr + t[:, None] * stride + columns[None, :], half,
             mask=(t < filled)[:, None] & (t[:, None] >= columns[None, :]))
    tl.store(ptr + columns[:, None] * stride + t[None, :], tl.trans(half),
             mask=(columns < filled)[:, None] & (t[None, :] > columns[:, None]))


@triton.jit
def softplus(x):
    """The softplus log(1 + e^x): x itself above 20, and without loss of digits where e^x vanishes beside 1."""
    e = tl.exp(tl.minimum(x, 20.0))
    return tl.where(x > 20.0, x, tl.where(x < -9.0, e - 0.5 * e * e, tl.log(1.0 + e)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gate_value(u, rate, bias, constant, GATE: tl.constexpr):
    """The log decay of the raw gate u (`gates.py`); `rate` is e^A_log, `constant` the lower bound or the normalizer."""
    g = u.to(tl.float32)
    if GATE == "softplus":
        g = -rate * softplus(g + bias)
    if GATE == "lower_bounded":
        g = constant * sigmoid(rate * (g + bias))
    if GATE == "logsigmoid":
        g = -softplus(-(g + bias)) / constant
    return g


@triton.jit
def gate_rate(A_log_ptr, head):
    """The rate e^A_log of a head, 1 without A_log."""
    rate = 1.0
    if A_log_ptr is not None:
        rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    return rate


@triton.jit
def gate_bias(bias_ptr, head):
    """The dt_bias of a head with a scalar decay, 0 without a bias."""
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head).to(tl.float32)
    return bias


@triton.jit
def load_gates(g_ptr, bias_ptr, rows, stride, columns, WIDTH: tl.constexpr, inside):
    """Load the raw gates [C, columns] of some channels and their biases [1, columns] in fp32, 0 without a bias."""
    bias = tl.zeros([1, columns.shape[0]], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    return load_tile(g_ptr, rows, stride, columns, WIDTH, inside), bias


@triton.jit
def log2_decay(u, rate, bias, constant, inside, GATE: tl.constexpr):
    """The log2 decays of a decay per channel, never below MIN_LOG2_DECAY; 0 outside."""
    g = gate_value(u, rate, bias, constant, GATE) * LOG2_E
    return tl.where(inside[:, None], tl.where(g < MIN_LOG2_DECAY, MIN_LOG2_DECAY, g), 0.0)


@triton.jit
def gate_gradients(u, dg, rate, bias, constant, GATE: tl.constexpr):
    """The gradients of u and of A_log, both per entry of g, from the gradient of g."""
    x = u.to(tl.float32) + bias
    du, dA = dg, dg
    if GATE == "softplus":
        du = -rate * sigmoid(x) * dg
        dA = -rate * softplus(x) * dg
    if GATE == "lower_bounded":
        s = sigmoid(rate * x)
        slope = constant * s * (1.0 - s) * dg
        du = slope * rate
        dA = slope * rate * x
    if GATE == "logsigmoid":
        du = sigmoid(-x) / constant * dg
    return du, dA


@triton.jit
def second_half(i, b):
    """Whether token i lies behind the border of its block at level b."""
    return (i & b) != 0


@triton.jit
def meet(i, j, b):
    """Whether the tokens i and j, in either order, meet at level b; i and j broadcast."""
    # Cut first: i ^ j would be the same at every level, and the compiler would keep it in registers.
    return ((i & -b) ^ (j & -b)) == b


@triton.jit
def pairs_of(i, j, b):
    """Whether the tokens i, in the second half, and j meet at level b; i and j broadcast."""
    return meet(i, j, b) & second_half(i, b)


@triton.jit
def lies_between(i, t, b, before=0):
    """Whether token t lies between token i and the border that i meets at level b; i and t broadcast.

    Where `before` is 1, a token i behind the border does not lie there itself.
    """
    start, second = i & -b, second_half(i, b)
    return (t >= tl.where(second, start, i + 1)) & (t <= tl.where(second, i - before, start + b - 1))


@triton.jit
def sum_over(members, x, EXACT: tl.constexpr):
    """Sums [C, K] of the rows of x over the members [C, C], to 24 bits (EXACT) or 16."""
    if EXACT:
        return tl.dot(members.to(tl.float32), x, input_precision="ieee")
    ones = members.to(tl.bfloat16)
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(ones, low, tl.dot(ones, high))


@triton.jit
def coarse_and_fine(g, STEPS: tl.constexpr):
    """Split log2 decays into the nearest multiples of 1 / STEPS and what is left.

    Sums of a chunk's coarse decays are exact in fp32, and sums of fine ones are small. So differences of sums keep the
    digits of a weak decay behind a strong one.
    """
    coarse = tl.floor(g * STEPS + 0.5) / STEPS
    return coarse, g - coarse


@triton.jit
def token_sums(g):
    """Cumulative sums of the decays g [C] of a chunk and their last values, each as a coarse sum and a fine one."""
    coarse, fine = coarse_and_fine(g, COARSE_STEPS)
    return tl.cumsum(coarse, axis=0), tl.cumsum(fine, axis=0), tl.sum(coarse, axis=0), tl.sum(fine, axis=0)


@triton.jit
def token_decay_between(coarse_i, fine_i, coarse_j, fine_j, i, j):
    """The products a_{j+1} ... a_i of decays per token, 0 for i < j, given the `token_sums` of i and of j."""
    apart = tl.minimum((coarse_i - coarse_j) + (fine_i - fine_j), 0.0)  # above 0 behind the chunk's last token alone
    return tl.exp2(tl.where(i >= j, apart, float("-inf")))


@triton.jit
def cumulative_sums(g, EXACT: tl.constexpr):
    """The sums of g [C, columns] up to each token: in fp64 (EXACT), or in fp32 with a single rounding."""
    if EXACT:
        return tl.cumsum(g.to(tl.float64), axis=0)
    else:
        t = tl.arange(0, C)
        lower = (t[:, None] >= t[None, :]).to(tl.float16)
        # fp16 holds coarse decays down to MIN_LOG2_DECAY, and 11 bits of fine ones.
        coarse, fine = coarse_and_fine(g, 8)
        return tl.dot(lower, coarse.to(tl.float16)) + tl.dot(lower, fine.to(tl.float16))


@triton.jit
def load_sums(sums_ptr, row, stride, columns, WIDTH: tl.constexpr, filled):
    """Load sums of `cumulative_sums` at the tokens `row` [C]; behind the chunk's last token they stay what they are."""
    return load_tile(sums_ptr, tl.minimum(row, filled - 1), stride, columns, WIDTH, row >= 0)


@triton.jit
def border_decay(sums, sums_ptr, stride, columns, WIDTH: tl.constexpr, filled, b):
    """The decays [C, columns] between each token and the border that it meets at level b.

    `sums` are those of `load_sums` for all tokens, `sums_ptr` the memory where rows find those of other tokens.
    """
    border = (tl.arange(0, C) & -(2 * b)) + (b - 1)
    return tl.exp2(-tl.abs((sums - load_sums(sums_ptr, border, stride, columns, WIDTH, filled)).to(tl.float32)))


@triton.jit
def decay_from_start(sums, sums_ptr, stride, columns, WIDTH: tl.constexpr, filled, LEVELS_MERGED: tl.constexpr):
    """The log2 decays [C, columns] from the start of each block of 2^LEVELS_MERGED tokens; `sums` as in
    `border_decay`."""
    start = tl.arange(0, C) & -(1 << LEVELS_MERGED)
    return (sums - load_sums(sums_ptr, start, stride, columns, WIDTH, filled)).to(tl.float32)


@triton.jit
def meets_border(b):
    """The pairs [C, C] of tokens i > j, i in rows, that meet at level b."""
    t = tl.arange(0, C)
    first_half = tl.where((t & b) != 0, (t & -b) - b, -1)
    return first_half[:, None] == (t & -b)[None, :]
