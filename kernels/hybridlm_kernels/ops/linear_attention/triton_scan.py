"""One scan over the chunks of documents for both the outputs and the gradients of linear attention with decay.

With D_ij = a_{j+1} ... a_i for i >= j, else 0, all of them are the same sum with the names exchanged:
    o_i  = sum_j D_ij (q_i . k_j) v_j      x, y, z = q, k, v       forward
    dq_i = sum_j D_ij (do_i . v_j) k_j     x, y, z = do, v, k      forward
    dk_j = sum_i D_ij (do_i . v_j) q_i     x, y, z = v, do, q      REVERSE
    dv_j = sum_i D_ij (q_i . k_j) do_i     x, y, z = k, q, do      REVERSE
so a program keeps the state sum_j (decay from j) y_j z_j^T [Y, Z] of one head of one document in registers, for some
of the columns of z, and writes no states unless asked to. REVERSE runs from the last chunk to the first.

The scores A of pairs inside a chunk are found in the scan from the x and y it reads anyway. Only where gates learn are
the scores of q and k kept, and those of do and v found before the scan (`pairs_kernel`), for the gradients of gates.
With a decay per channel (of the axis Y) `triton_channel.py` finds the scores, and x and y are already multiplied by
their decays. With a decay per token `token_decays_kernel` has found what scans need of it: sums of gates would stand in
the chain of chunks, once per block of columns.

Legend: N documents, U segments of documents, HV value heads, C tokens per chunk, P chunks, Y/Z dims as above, BZ
columns of z per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_tiles import (
    LOG2_E,
    MIN_LOG2_TOKEN_DECAY,
    C,
    gate_bias,
    gate_gradients,
    gate_rate,
    gate_value,
    load_tile,
    locate_chunk,
    store_tile,
    token_sums,
)
from hybridlm_kernels.triton_support import tuned

# Rows of the decays of a chunk [4, C], fp32.
COARSE = tl.constexpr(0)  # sums of a decay per token in log2 units, as `token_sums` gives them
FINE = tl.constexpr(1)
FROM_START = tl.constexpr(2)  # the decay from the chunk's start to each token
TO_END = tl.constexpr(3)  # the decay from each token to the chunk's end
ROWS = tl.constexpr(4)

# LEAN scans find the scores of pairs before what comes from the state, and masks and constant decays again in every
# chunk. So they fit the registers of four warps, and a multiprocessor holds two programs.
CONFIGS = [triton.Config({"LEAN": lean}, num_warps=warps, num_stages=stages)
           for lean, warps, stages in ((1, 4, 2), (0, 8, 2), (0, 8, 3), (1, 4, 3))]


@triton.jit
def token_decays_kernel(g_ptr, A_log_ptr, bias_ptr, gate_constant, chunks_ptr, decays_ptr, HV, GATE: tl.constexpr):
    """Write decays [P, HV, 4, C] of a chunk's tokens, for a decay per token. One program per chunk and head.

    Their rows are COARSE, FINE, FROM_START and TO_END. Behind the chunk's last token the first three stay the same.
    """
    chunk, head, first, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    u = tl.load(g_ptr + first * HV + head + t * HV, mask=t < filled, other=0.0)
    g = gate_value(u, gate_rate(A_log_ptr, head), gate_bias(bias_ptr, head), gate_constant, GATE) * LOG2_E
    coarse, fine, last, last_fine = token_sums(tl.where(t < filled, tl.maximum(g, MIN_LOG2_TOKEN_DECAY), 0.0))
    at = decays_ptr + (chunk * HV + head) * (ROWS * C) + t
    tl.store(at + COARSE * C, coarse)
    tl.store(at + FINE * C, fine)
    tl.store(at + FROM_START * C, tl.exp2(coarse + fine))
    tl.store(at + TO_END * C, tl.exp2((last - coarse) + (last_fine - fine)))


@triton.jit
def _constant_decay(g_ptr, head, DECAY: tl.constexpr):
    """The log2 of a constant decay, the same at every token; 0 without one."""
    if DECAY == "constant":
        return tl.maximum(tl.load(g_ptr + head).to(tl.float32) * LOG2_E, MIN_LOG2_TOKEN_DECAY)
    return 0.0


@triton.jit
def _edges(g_ptr, decays_ptr, filled, head, DECAY: tl.constexpr):
    """The decays from the chunk's start to each token [C], from each token to the chunk's end [C], and of the chunk."""
    t = tl.arange(0, C)
    if DECAY == "scalar":
        prefix, suffix = tl.load(decays_ptr + FROM_START * C + t), tl.load(decays_ptr + TO_END * C + t)
        return prefix, suffix, tl.load(decays_ptr + FROM_START * C + C - 1)
    else:
        g = _constant_decay(g_ptr, head, DECAY)
        return tl.exp2((t + 1) * g), tl.exp2(tl.maximum(filled - 1 - t, 0) * g), tl.exp2(filled * g)


@triton.jit
def _decay_between(g_ptr, decays_ptr, head, DECAY: tl.constexpr, REVERSE: tl.constexpr):
    """The decays D_ij [C, C], 0 above the diagonal; with REVERSE D_ji, 0 below it."""
    t = tl.arange(0, C)
    if DECAY == "scalar":
        coarse, fine = tl.load(decays_ptr + COARSE * C + t), tl.load(decays_ptr + FINE * C + t)
        apart = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    else:
        apart = (t[:, None] - t[None, :]) * _constant_decay(g_ptr, head, DECAY)
    if REVERSE:
        apart = tl.where(t[:, None] <= t[None, :], -apart, float("-inf"))
    else:
        apart = tl.where(t[:, None] >= t[None, :], apart, float("-inf"))
    return tl.exp2(apart)


@triton.jit
def _scores(x, y, scale, A_ptr, row, inside, g_ptr, decays_ptr, head, HV, dtype: tl.constexpr, DECAY: tl.constexpr,
            REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """The scores [C, C] of a chunk's x against its y, also written to A at `row` unless that is None."""
    between = _decay_between(g_ptr, decays_ptr, head, DECAY, REVERSE)
    scores = (tl.dot(x, tl.trans(y), input_precision=PRECISION) * between * scale).to(dtype)
    if A_ptr is not None:  # the programs of all blocks of z write the same numbers
        t = tl.arange(0, C)
        store_tile(A_ptr + row * C, t, HV * C, t, C, inside, scores)
    return scores


@triton.jit
def pairs_kernel(x_ptr, y_ptr, decays_ptr, chunks_ptr, A_ptr, other_ptr, dots_ptr, scale, HV, XY_GROUP, Y: tl.constexpr,
                 BY: tl.constexpr, EXACT: tl.constexpr):
    """Write A [tokens, HV, C]: scale D_ij (x_i . y_j), 0 above the diagonal. One program per chunk and head.

    Also write dots [tokens, HV], the terms of the decays' gradients from pairs i > j: with p_ij = (x_i . y_j) other_ij,
    where `other` is the A of q and k, the sum of p over row i less the sum over column i.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    chunk, head, token, filled = locate_chunk(chunks_ptr)
    t = tl.arange(0, C)
    inside, stride = t < filled, HV // XY_GROUP * Y
    at = token * stride + head // XY_GROUP * Y
    scores = tl.zeros([C, C], tl.float32)
    for y0 in range(0, Y, BY):
        dims = y0 + tl.arange(0, BY)
        x, y = load_tile(x_ptr + at, t, stride, dims, Y, inside), load_tile(y_ptr + at, t, stride, dims, Y, inside)
        scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
    other = load_tile(other_ptr + (token * HV + head) * C, t, HV * C, t, C, inside).to(tl.float32)
    pairs = tl.where(t[:, None] > t[None, :], scores * other, 0.0)
    tl.store(dots_ptr + token * HV + head + t * HV, tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0), mask=inside)
    between = _decay_between(None, decays_ptr + (chunk * HV + head) * (ROWS * C), head, "scalar", False)
    store_tile(A_ptr + (token * HV + head) * C, t, HV * C, t, C, inside, scores * between * scale)


@tuned(CONFIGS, ["Y", "Z", "BZ", "DECAY", "REVERSE", "OUTPUT", "PAIRS", "STATES", "DOTS", "EXACT", "full"])
@triton.jit(do_not_specialize=["tokens", "chunks", "full"])
def scan_kernel(x_ptr, y_ptr, z_ptr, w_ptr, A_ptr, g_ptr, decays_ptr, chunk_total_ptr, start_ptr, segments_ptr, out_ptr,
                last_ptr, total_ptr, states_ptr, dots_ptr, carry_ptr, scale, tokens, chunks, full, HV: tl.constexpr,
                XY_GROUP: tl.constexpr, Z_GROUP: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, BY: tl.constexpr,
                BZ: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
                PAIRS: tl.constexpr, STATES: tl.constexpr, DOTS: tl.constexpr, LEAN: tl.constexpr, EXACT: tl.constexpr):
    """Scan segments of x, y [tokens, HV / XY_GROUP, Y] and z, w [tokens, HV / Z_GROUP, Z].

    XY_GROUP and Z_GROUP are the value heads per head of x and y, and of z. start and last [U, HV, Y, Z], the states
    before and after segments, may be None.

    OUTPUT writes out [tokens, HV, Z]; without it only last and the decay of each segment, total [U, HV(, Y)].
    PAIRS finds the scores here, and writes them to A [tokens, HV, C] unless A is None; without it A is read.
    STATES writes the states before chunks [P, HV, Y, Z], with REVERSE those after them.
    DOTS writes dots [Z / BZ, tokens, HV], w_i . out_i for the part of out that comes from the state. With REVERSE it
    also reads `states` and writes carry [Z / BZ, P, HV]: the sum of (state before) (state after) (decay of the chunk).
    `decays` [P, HV, 4, C] are those of `token_decays_kernel`, read with a decay per token. LEAN changes no result.
    `full`, which only tuning reads, is 1 where the programs fill the device.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    Z_BLOCKS: tl.constexpr = (Z + BZ - 1) // BZ
    program = tl.program_id(0).to(tl.int64)
    z_block, head = program % Z_BLOCKS, program // Z_BLOCKS % HV
    row = segments_ptr + program // Z_BLOCKS // HV * 4
    segment, first, end, chunk = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    t, dims, columns = tl.arange(0, C), tl.arange(0, BY), z_block.to(tl.int32) * BZ + tl.arange(0, BZ)
    real = dims < Y
    xy_stride: tl.constexpr = HV // XY_GROUP * Y  # constants: a tile has one address and fixed offsets
    z_stride: tl.constexpr = HV // Z_GROUP * Z
    x_ptr += head // XY_GROUP * Y
    y_ptr += head // XY_GROUP * Y
    z_ptr += head // Z_GROUP * Z
    if DOTS:
        w_ptr += head // Z_GROUP * Z
    S = tl.zeros([BY, BZ], tl.float32)
    if start_ptr is not None:
        S += load_tile(start_ptr + (segment * HV + head) * Y * Z, dims, Z, columns, Z, real).to(tl.float32)
    total_of_segment = tl.zeros([BY], tl.float32) + 1.0
    steps = (end - first + C - 1) // C
    for step in tl.range(0, steps, disable_licm=LEAN and PAIRS):
        number = steps - 1 - step if REVERSE else step
        here = (chunk + number) * HV + head
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
            decays_here = None if decays_ptr is None else decays_ptr + here * (ROWS * C)
            prefix, suffix, total = _edges(g_ptr, decays_here, filled, head, DECAY)
        if OUTPUT:
            x = load_tile(x_ptr + token * xy_stride, t, xy_stride, dims, Y, inside)
            if PAIRS and LEAN:
                scores = _scores(x, y, scale, A_ptr, token * HV + head, inside, g_ptr, decays_here, head, HV, z.dtype,
                                 DECAY, REVERSE, PRECISION)
            out = tl.dot(x, S.to(x.dtype), input_precision=PRECISION)
            if DECAY != "channel":
                out *= (suffix if REVERSE else prefix * scale)[:, None]
            if PAIRS:
                if not LEAN:
                    scores = _scores(x, y, scale, A_ptr, token * HV + head, inside, g_ptr, decays_here, head, HV,
                                     z.dtype, DECAY, REVERSE, PRECISION)
            else:
                A_at = t[None, :] * (HV * C) + t[:, None] if REVERSE else t[:, None] * (HV * C) + t[None, :]
                inside_both = inside[:, None] & inside[None, :]
                scores = tl.load(A_ptr + (token * HV + head) * C + A_at, mask=inside_both, other=0.0)
            if DOTS:
                w = load_tile(w_ptr + token * z_stride, t, z_stride, columns, Z, inside).to(tl.float32)
                at_dots = dots_ptr + (z_block * tokens + token) * HV + head + t * HV
                tl.store(at_dots, tl.sum(w * out, axis=1), mask=inside)
                if REVERSE:
                    before = load_tile(states_ptr + here * Y * Z, dims, Z, columns, Z, real).to(tl.float32)
                    tl.store(carry_ptr + z_block * chunks * HV + here, tl.sum(before * S) * total)
            out = tl.dot(scores, z, out, input_precision=PRECISION)
            store_tile(out_ptr + (token * HV + head) * Z, t, HV * Z, columns, Z, inside, out)
        else:
            total_of_segment *= total
        if DECAY == "channel":
            S = tl.dot(tl.trans(y), z, S * total[:, None], input_precision=PRECISION)
        else:
            written = (z * (prefix * scale if REVERSE else suffix)[:, None]).to(z.dtype)
            S = tl.dot(tl.trans(y), written, S * total, input_precision=PRECISION)
    if last_ptr is not None:
        store_tile(last_ptr + (segment * HV + head) * Y * Z, dims, Z, columns, Z, real, S)
    if total_ptr is not None:  # the programs of all blocks of z write the same numbers
        if DECAY == "channel":
            tl.store(total_ptr + (segment * HV + head) * Y + dims, total_of_segment, mask=real)
        else:
            tl.store(total_ptr + (segment * HV + head) + dims, total_of_segment, mask=dims == 0)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def gate_gradient_kernel(pairs_ptr, dots_ptr, reverse_dots_ptr, carry_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant,
                         chunks_ptr, dg_ptr, d_A_log_ptr, d_bias_ptr, tokens, chunks, HV, BLOCKS: tl.constexpr,
                         GATE: tl.constexpr):
    """Write dg [tokens, HV], and per chunk d_A_log and d_bias [P, HV], from the dots of pairs, of dq and of dk, the
    latter two over BLOCKS blocks of z.

    A decay t is a factor of the pair (i, j) when j < t <= i. Pairs inside the chunk count for their row and against
    their column, reads of the state count in the rows from t on, writes to it in the columns before t.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, filled = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    t = tl.arange(0, C)
    rows, inside, here = first + t, t < filled, chunk * HV + head
    at = rows * HV + head
    later, before, carry = tl.load(pairs_ptr + at, mask=inside, other=0.0), tl.zeros([C], tl.float32), 0.0
    for b in tl.static_range(BLOCKS):
        block = chunk * 0 + b  # 64 bits
        later += tl.load(dots_ptr + block * tokens * HV + at, mask=inside, other=0.0)
        before += tl.load(reverse_dots_ptr + block * tokens * HV + at, mask=inside, other=0.0)
        carry += tl.load(carry_ptr + block * chunks * HV + here)
    from_t = t[None, :] >= t[:, None]
    dg = carry + tl.sum(tl.where(from_t, later[None, :], before[None, :]), axis=1)
    u = tl.load(g_ptr + rows * HV + head, mask=inside, other=0.0)
    rate, bias = gate_rate(A_log_ptr, head), gate_bias(bias_ptr, head)
    du, dA = gate_gradients(u, dg, rate, bias, gate_constant, GATE)
    tl.store(dg_ptr + rows * HV + head, du.to(dg_ptr.dtype.element_ty), mask=inside)
    if d_A_log_ptr is not None:
        tl.store(d_A_log_ptr + here, tl.sum(tl.where(inside, dA, 0.0)))
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + here, tl.sum(tl.where(inside, du, 0.0)))
