"""One scan over the chunks of documents that serves outputs and gradients of linear attention with decay.

With D_ij = a_{j+1} ... a_i for i >= j, else 0, every tensor wanted is one and the same sum with the names exchanged:
    o_i  = sum_j D_ij (q_i . k_j) v_j      x, y, z = q, k, v       forward
    dq_i = sum_j D_ij (do_i . v_j) k_j     x, y, z = do, v, k      forward
    dk_j = sum_i D_ij (do_i . v_j) q_i     x, y, z = v, do, q      REVERSE
    dv_j = sum_i D_ij (q_i . k_j) do_i     x, y, z = k, q, do      REVERSE
so a program keeps the state sum_j (decay from j) y_j z_j^T [Y, Z] of one head of one document in registers, for some of
the columns of z, and no state is written unless asked for. REVERSE runs from the last chunk to the first.

The scores A of pairs inside a chunk are found on the way, from the x and y that are there anyway. Only where gates
learn are those of q and k kept, and those of do and v found before (`pairs_kernel`), for the gradients of gates. With a
decay a channel (the axis Y) `triton_channel.py` finds the scores, and x and y come with their decays multiplied in.

Legend: N documents, U pieces of documents, G heads, C tokens a chunk, P chunks, Y/Z dims as above, BZ columns of z a
program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_tiles import (
    LOG2_E,
    C,
    gate_bias,
    gate_gradients,
    gate_rate,
    gate_value,
    load_tile,
    store_tile,
)
from hybridlm_kernels.triton_support import tuned

MOST_FORGOTTEN = tl.constexpr(-1000.0)  # of a log2 decay: 2^that is 0
GRID = tl.constexpr(256.0)  # 64 multiples of 1 / 256, none beyond MOST_FORGOTTEN, add up exactly in float32
CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((8, 2), (4, 2), (4, 3), (8, 3))]


@triton.jit
def log2_decay(g_ptr, A_log_ptr, bias_ptr, gate_constant, token, inside, head, G, GATE: tl.constexpr):
    """[C] the log2 decays of a head's tokens from `token` on, 0 outside."""
    u = tl.load(g_ptr + token * G + head + tl.arange(0, C) * G, mask=inside, other=0.0)
    rate, bias = gate_rate(A_log_ptr, head), gate_bias(bias_ptr, head)
    g = gate_value(u, rate, bias, gate_constant, GATE) * LOG2_E
    return tl.where(inside, tl.maximum(g, MOST_FORGOTTEN), 0.0)


@triton.jit
def sums(g):
    """Cumulative sums of g [C] and their ends, multiples of 1 / GRID and the rest apart: so a difference of two keeps
    the digits of a weak decay behind a strong one."""
    coarse = tl.floor(g * GRID + 0.5) / GRID
    return tl.cumsum(coarse, axis=0), tl.cumsum(g - coarse, axis=0), tl.sum(coarse, axis=0), tl.sum(g - coarse, axis=0)


@triton.jit
def _constant_decay(g_ptr, head, DECAY: tl.constexpr):
    """log2 of a decay that is the same at every token."""
    if DECAY == "constant":
        return tl.maximum(tl.load(g_ptr + head).to(tl.float32) * LOG2_E, MOST_FORGOTTEN)
    return 0.0


@triton.jit
def _edges(g_ptr, A_log_ptr, bias_ptr, gate_constant, token, inside, filled, head, G, DECAY: tl.constexpr,
           GATE: tl.constexpr):
    """Decays [C] from the chunk's start to each token, [C] from each token to its end, and of the whole chunk."""
    t = tl.arange(0, C)
    if DECAY == "head":
        coarse, rest, last, last_rest = sums(log2_decay(g_ptr, A_log_ptr, bias_ptr, gate_constant, token, inside, head,
                                                        G, GATE))
        prefix, suffix, total = coarse + rest, (last - coarse) + (last_rest - rest), last + last_rest
    else:
        g = _constant_decay(g_ptr, head, DECAY)
        prefix, suffix, total = (t + 1) * g, tl.maximum(filled - 1 - t, 0) * g, filled * g
    return tl.exp2(prefix), tl.exp2(suffix), tl.exp2(total)


@triton.jit
def _between(g_ptr, A_log_ptr, bias_ptr, gate_constant, token, inside, head, G, DECAY: tl.constexpr, GATE: tl.constexpr,
             REVERSE: tl.constexpr):
    """D_ij [C, C], 0 above the diagonal; REVERSE: D_ji, 0 below it."""
    t = tl.arange(0, C)
    if DECAY == "head":
        coarse, rest, _, _ = sums(log2_decay(g_ptr, A_log_ptr, bias_ptr, gate_constant, token, inside, head, G, GATE))
        apart = (coarse[:, None] - coarse[None, :]) + (rest[:, None] - rest[None, :])
    else:
        apart = (t[:, None] - t[None, :]) * _constant_decay(g_ptr, head, DECAY)
    if REVERSE:
        apart = tl.where(t[:, None] <= t[None, :], -apart, float("-inf"))
    else:
        apart = tl.where(t[:, None] >= t[None, :], apart, float("-inf"))
    return tl.exp2(apart)


@triton.jit
def pairs_kernel(x_ptr, y_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant, chunks_ptr, A_ptr, other_ptr, dots_ptr,
                 scale, G, XY_SHARE, Y: tl.constexpr, BY: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr):
    """A [tokens, G, C]: scale D_ij (x_i . y_j), 0 above the diagonal. One program a chunk and head.

    Also what the pairs i > j, (x_i . y_j) other_ij with the A of the other pair of names, give to the decays,
    dots [tokens, G]: the sum over row i less the sum over column i.
    """
    P: tl.constexpr = "ieee" if EXACT else "tf32"
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token, filled = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    t = tl.arange(0, C)
    inside, stride = t < filled, G // XY_SHARE * Y
    at = token * stride + head // XY_SHARE * Y
    scores = tl.zeros([C, C], tl.float32)
    for y0 in range(0, Y, BY):
        dims = y0 + tl.arange(0, BY)
        x, y = load_tile(x_ptr + at, t, stride, dims, Y, inside), load_tile(y_ptr + at, t, stride, dims, Y, inside)
        scores = tl.dot(x, tl.trans(y), scores, input_precision=P)
    other = load_tile(other_ptr + (token * G + head) * C, t, G * C, t, C, inside).to(tl.float32)
    pairs = tl.where(t[:, None] > t[None, :], scores * other, 0.0)
    tl.store(dots_ptr + token * G + head + t * G, tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0), mask=inside)
    between = _between(g_ptr, A_log_ptr, bias_ptr, gate_constant, token, inside, head, G, "head", GATE, False)
    store_tile(A_ptr + (token * G + head) * C, t, G * C, t, C, inside, scores * between * scale)


@tuned(CONFIGS, ["Y", "Z", "BZ", "DECAY", "REVERSE", "OUTPUT", "PAIRS", "STATES", "DOTS", "EXACT"])
@triton.jit
def scan_kernel(x_ptr, y_ptr, z_ptr, w_ptr, A_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant, chunk_total_ptr,
                start_ptr, pieces_ptr, out_ptr, last_ptr, total_ptr, states_ptr, dots_ptr, carry_ptr, scale, tokens,
                chunks, G: tl.constexpr, XY_SHARE: tl.constexpr, Z_SHARE: tl.constexpr, Y: tl.constexpr,
                Z: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
                REVERSE: tl.constexpr, OUTPUT: tl.constexpr, PAIRS: tl.constexpr, STATES: tl.constexpr,
                DOTS: tl.constexpr, EXACT: tl.constexpr):
    """x, y [tokens, G / XY_SHARE, Y], z, w [tokens, G / Z_SHARE, Z]; start, last [U, G, Y, Z] or None.

    OUTPUT: out [tokens, G, Z]. Else last alone, and the decay of the whole piece, total [U, G] or [U, G, Y].
    PAIRS: scores are found here, and written to A [tokens, G, C] unless it is None. Else A is read.
    STATES: the states that chunks start from [P, G, Y, Z]; REVERSE those behind them.
    DOTS: dots [Z / BZ, tokens, G], w_i . out_i as far as it comes from the state. REVERSE also: carry [Z / BZ, P, G],
    the sum of states before times those behind times the decay of the chunk; `states` is read for it.
    """
    P: tl.constexpr = "ieee" if EXACT else "tf32"
    Z_BLOCKS: tl.constexpr = (Z + BZ - 1) // BZ
    program = tl.program_id(0).to(tl.int64)
    z_block, head = program % Z_BLOCKS, program // Z_BLOCKS % G
    row = pieces_ptr + program // Z_BLOCKS // G * 4
    piece, first, end, chunk = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    t, dims, columns = tl.arange(0, C), tl.arange(0, BY), z_block.to(tl.int32) * BZ + tl.arange(0, BZ)
    real = dims < Y
    xy_stride: tl.constexpr = G // XY_SHARE * Y  # constants: one address a tile and fixed distances from it
    z_stride: tl.constexpr = G // Z_SHARE * Z
    x_ptr += head // XY_SHARE * Y
    y_ptr += head // XY_SHARE * Y
    z_ptr += head // Z_SHARE * Z
    if DOTS:
        w_ptr += head // Z_SHARE * Z
    S = tl.zeros([BY, BZ], tl.float32)
    if start_ptr is not None:
        S += load_tile(start_ptr + (piece * G + head) * Y * Z, dims, Z, columns, Z, real).to(tl.float32)
    total_of_piece = tl.zeros([BY], tl.float32) + 1.0
    steps = (end - first + C - 1) // C
    for step in range(steps):
        number = steps - 1 - step if REVERSE else step
        here = (chunk + number) * G + head
        token = first + number * C  # offsets from it fit 32 bits
        filled = tl.minimum(end - token, C).to(tl.int32)
        inside = t < filled
        if STATES:
            store_tile(states_ptr + here * Y * Z, dims, Z, columns, Z, real, S)
        y = load_tile(y_ptr + token * xy_stride, t, xy_stride, dims, Y, inside)
        z = load_tile(z_ptr + token * z_stride, t, z_stride, columns, Z, inside)
        if DECAY == "channel":
            total = tl.load(chunk_total_ptr + here * Y + dims, mask=real, other=0.0)
        else:
            prefix, suffix, total = _edges(g_ptr, A_log_ptr, bias_ptr, gate_constant, token, inside, filled, head, G,
                                           DECAY, GATE)
        if OUTPUT:
            x = load_tile(x_ptr + token * xy_stride, t, xy_stride, dims, Y, inside)
            out = tl.dot(x, S.to(x.dtype), input_precision=P)
            if DECAY != "channel":
                out *= (suffix if REVERSE else prefix * scale)[:, None]
            if PAIRS:
                between = _between(g_ptr, A_log_ptr, bias_ptr, gate_constant, token, inside, head, G, DECAY, GATE,
                                   REVERSE)
                scores = (tl.dot(x, tl.trans(y), input_precision=P) * between * scale).to(z.dtype)
                if A_ptr is not None:  # the programs of all blocks of z write the same
                    store_tile(A_ptr + (token * G + head) * C, t, G * C, t, C, inside, scores)
            else:
                A_at = t[None, :] * (G * C) + t[:, None] if REVERSE else t[:, None] * (G * C) + t[None, :]
                inside_both = inside[:, None] & inside[None, :]
                scores = tl.load(A_ptr + (token * G + head) * C + A_at, mask=inside_both, other=0.0)
            if DOTS:
                w = load_tile(w_ptr + token * z_stride, t, z_stride, columns, Z, inside).to(tl.float32)
                tl.store(dots_ptr + (z_block * tokens + token) * G + head + t * G, tl.sum(w * out, axis=1), mask=inside)
                if REVERSE:
                    before = load_tile(states_ptr + here * Y * Z, dims, Z, columns, Z, real).to(tl.float32)
                    tl.store(carry_ptr + z_block * chunks * G + here, tl.sum(before * S) * total)
            out = tl.dot(scores, z, out, input_precision=P)
            store_tile(out_ptr + (token * G + head) * Z, t, G * Z, columns, Z, inside, out)
        else:
            total_of_piece *= total
        if DECAY == "channel":
            S = tl.dot(tl.trans(y), z, S * total[:, None], input_precision=P)
        else:
            written = (z * (prefix * scale if REVERSE else suffix)[:, None]).to(z.dtype)
            S = tl.dot(tl.trans(y), written, S * total, input_precision=P)
    if last_ptr is not None:
        store_tile(last_ptr + (piece * G + head) * Y * Z, dims, Z, columns, Z, real, S)
    if total_ptr is not None:  # the programs of all blocks of z write the same
        if DECAY == "channel":
            tl.store(total_ptr + (piece * G + head) * Y + dims, total_of_piece, mask=real)
        else:
            tl.store(total_ptr + (piece * G + head) + dims, total_of_piece, mask=dims == 0)


@triton.jit
def gate_gradient_kernel(pairs_ptr, dots_ptr, reverse_dots_ptr, carry_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant,
                         chunks_ptr, dg_ptr, d_A_log_ptr, d_bias_ptr, tokens, chunks, G, BLOCKS: tl.constexpr,
                         GATE: tl.constexpr):
    """dg [tokens, G], and by chunk d_A_log and d_bias [P, G], from the dots of pairs, and of dq and dk over BLOCKS
    blocks of z.

    A decay t is part of a pair (i, j) when j < t <= i: pairs inside the chunk give to rows and take from columns, what
    is read from the state comes with the rows from t on, what is written to it with the columns before t.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, filled = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    t = tl.arange(0, C)
    rows, inside, here = first + t, t < filled, chunk * G + head
    at = rows * G + head
    later, before, carry = tl.load(pairs_ptr + at, mask=inside, other=0.0), tl.zeros([C], tl.float32), 0.0
    for b in tl.static_range(BLOCKS):
        block = chunk * 0 + b  # 64 bits
        later += tl.load(dots_ptr + block * tokens * G + at, mask=inside, other=0.0)
        before += tl.load(reverse_dots_ptr + block * tokens * G + at, mask=inside, other=0.0)
        carry += tl.load(carry_ptr + block * chunks * G + here)
    from_t = t[None, :] >= t[:, None]
    dg = carry + tl.sum(tl.where(from_t, later[None, :], before[None, :]), axis=1)
    u = tl.load(g_ptr + rows * G + head, mask=inside, other=0.0)
    rate, bias = gate_rate(A_log_ptr, head), gate_bias(bias_ptr, head)
    du, dA = gate_gradients(u, dg, rate, bias, gate_constant, GATE)
    tl.store(dg_ptr + rows * G + head, du.to(dg_ptr.dtype.element_ty), mask=inside)
    if d_A_log_ptr is not None:
        tl.store(d_A_log_ptr + here, tl.sum(tl.where(inside, dA, 0.0)))
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + here, tl.sum(tl.where(inside, du, 0.0)))
