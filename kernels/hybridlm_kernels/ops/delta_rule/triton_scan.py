"""Scans over chunks: states and outputs from first to last, and their gradients from last to first.

A chunk takes the state S before it to M S + N, with M = diag(total) - W^T B (I - X B) K; the gradient of a state goes
back by the transposed M. So a document can be cut into segments that are scanned side by side from a state of zero,
together with the product of their M. `triton_join.py` finds the state before each segment, and a second scan starts
from it. A document that is not cut is one segment.

With S the state at the start of a chunk, Q, K, W its decayed queries, keys and writes, B = diag(beta):
    R = V - K S,  Y = R - X B R,  O = Q S + A B Y,  S' = diag(total) S + W^T B Y
and backward, D the gradient of B Y, Z = dY / B:
    D = A^T dO + W dS',  Z = D - X^T B D,  dS = diag(total) dS' + Q^T dO - K^T B Z
Erase keys P take the place of K. With free erase vectors, B = -I and W their decayed rows, so that Y are the negative
reads. Values are then written at decayed keys of their own, N, and `triton_value_keys.py` has found what reads and
outputs get of a chunk's own values, R' and O':
    R = R' - P S,  O = Q S + A B Y + O',  S' = diag(total) S + W^T B Y + N^T V
A program takes some columns of the values of one head of one segment; the longest segments come first.

Legend: N documents, U segments, H key heads, HV value heads, K/V key/value head dim, C tokens per chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_chunk import BETA, KEY, NUM_FACTORS, QUERY, WRITE
from hybridlm_kernels.recurrence.triton_tiles import C, load_tile, locate_tokens, store_tile
from hybridlm_kernels.triton_support import tuned

CONFIGS = [triton.Config({"BV": values}, num_warps=warps, num_stages=stages)
           for values, warps, stages in ((32, 4, 2), (64, 8, 2), (16, 4, 2), (16, 8, 1), (32, 4, 1))]


@triton.jit
def locate_program(segments_ptr, HV, BLOCKS: tl.constexpr):
    """Find the program's segment, its first token, end and first chunk, the head, and the block of columns."""
    program = tl.program_id(0).to(tl.int64)
    row = segments_ptr + program // BLOCKS // HV * 4
    segment, first, end, first_chunk = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return segment, first, end, first_chunk, program // BLOCKS % HV, program % BLOCKS


@triton.jit
def scan_step(S, q_ptr, k_ptr, w_ptr, n_ptr, key_stride, v_ptr, written_ptr, own_ptr, A_ptr, X_ptr, factors_ptr,
              total_ptr, o_ptr, y_ptr, tokens, inside, token, reads, of_values, channels, columns, HV, K: tl.constexpr,
              V: tl.constexpr, CHANNEL: tl.constexpr, OWN: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr):
    """The state after a chunk from S, the state before it; writes o (MODE "outputs") or Y (MODE "states").

    Pointers are those of the head and of the chunk's first token. Values are read where `of_values` is true.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    i = tl.arange(0, C)
    k = load_tile(k_ptr, i, key_stride, channels, K, inside)
    v = load_tile(v_ptr, i, HV * V, columns, V, of_values).to(tl.float32)
    X = load_tile(X_ptr, i, HV * C, i, C, inside)
    beta = tl.load(factors_ptr + BETA * tokens + i, mask=inside, other=0.0)[:, None]
    S_half = S.to(k.dtype)
    seen = tl.dot(k, S_half, input_precision=PRECISION)
    if not CHANNEL:
        seen *= tl.load(factors_ptr + KEY * tokens + i, mask=inside, other=0.0)[:, None]
    R = v - seen
    Y = R - tl.dot(X, (beta * R).to(k.dtype), input_precision=PRECISION)
    if MODE == "outputs":
        q = load_tile(q_ptr, token, key_stride, channels, K, reads)
        A = load_tile(A_ptr, token, HV * C, i, C, reads)
        o = tl.dot(q, S_half, input_precision=PRECISION)
        if not CHANNEL:
            o *= tl.load(factors_ptr + QUERY * tokens + i, mask=inside, other=0.0)[:, None]
        o = tl.dot(A, (beta * Y).to(k.dtype), o, input_precision=PRECISION)
        if own_ptr is not None:
            o += load_tile(own_ptr, i, HV * V, columns, V, inside)
        store_tile(o_ptr, token, HV * V, columns, V, reads, o)
    if MODE == "states":
        store_tile(y_ptr, i, HV * V, columns, V, inside, Y)
    written = beta * Y
    if CHANNEL:
        w = load_tile(w_ptr, i, key_stride, channels, K, inside)
        S *= tl.load(total_ptr + channels, mask=channels < K, other=0.0)[:, None]
        if n_ptr is not None:
            n = load_tile(n_ptr, i, key_stride, channels, K, inside)
            values = load_tile(written_ptr, i, HV * V, columns, V, of_values)
            S = tl.dot(tl.trans(n), values, S, input_precision=PRECISION)
        return tl.dot(tl.trans(w), written.to(w.dtype), S, input_precision=PRECISION)
    else:
        written *= tl.load(factors_ptr + WRITE * tokens + i, mask=inside, other=0.0)[:, None]
        S *= tl.load(total_ptr)
        w = k
        if OWN:
            w = load_tile(w_ptr, i, key_stride, channels, K, inside)
        return tl.dot(tl.trans(w), written.to(w.dtype), S, input_precision=PRECISION)


@tuned(CONFIGS, ["K", "V", "CHANNEL", "OWN", "FREE", "STEPS", "MODE", "EXACT", "full"], many=CONFIGS[1])
@triton.jit(do_not_specialize=["tokens", "full"])
def scan_kernel(q_ptr, k_ptr, w_ptr, n_ptr, v_ptr, written_ptr, own_ptr, A_ptr, X_ptr, factors_ptr, total_ptr,
                state_ptr, segments_ptr, o_ptr, last_ptr, transitions_ptr, states_ptr, y_ptr, tokens, full, H, HV,
                K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHANNEL: tl.constexpr,
                OWN: tl.constexpr, FREE: tl.constexpr, STEPS: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr):
    """Scan segments from the states before them [U, HV, K, V], zero for None.

    OWN says that erase keys (`k_ptr`) and written keys (`w_ptr`) differ, FREE that erase vectors are free: R' takes the
    place of values then, O' is `own_ptr`, and values (`written_ptr`) are written at keys of their own (`n_ptr`). Where
    a token is STEPS rows, `tokens` are rows, but those of q, A and o.

    MODE "outputs" writes o [tokens, HV, V] and, unless None, the last states [U, HV, K, V].
    MODE "states", for the backward pass, writes the states before every chunk [P, HV, K, V] and Y [tokens, HV, V].
    MODE "segments", from a state of zero, writes the last states [U, HV, K, V] and the products of the transitions
    [U, HV, K, K], whose columns are those of a state that starts from the identity and has no values.
    `full`, which only tuning reads, is 1 where programs of 64 columns fill the device.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    BLOCKS: tl.constexpr = V_BLOCKS + (K + BV - 1) // BV if MODE == "segments" else V_BLOCKS
    segment, first, end, chunk, head, block = locate_program(segments_ptr, HV, BLOCKS)
    key_head = head if CHANNEL else head // (HV // H)
    heads = HV if CHANNEL else H
    t, channels = tl.arange(0, C), tl.arange(0, BK)
    real = channels < K
    has_values = block < V_BLOCKS
    columns = tl.where(has_values, block, block - V_BLOCKS) * BV + tl.arange(0, BV)
    S = tl.zeros([BK, BV], tl.float32)
    if MODE == "segments":
        S += tl.where(channels[:, None] == tl.where(has_values, -1, columns)[None, :], 1.0, 0.0)
    if state_ptr is not None:
        S += load_tile(state_ptr + (segment * HV + head) * K * V, channels, V, columns, V, real).to(tl.float32)
    for start in range(first, end, C):
        inside = t < end - start
        of_values = t < tl.where(has_values, end - start, 0) if MODE == "segments" else inside
        if MODE == "states":
            store_tile(states_ptr + (chunk * HV + head) * K * V, channels, V, columns, V, real, S)
        at_keys, at_values = (start * heads + key_head) * K, (start * HV + head) * V
        at_scores = (start * HV + head) * C
        first_token, token, _, reads = locate_tokens(start, inside, STEPS)
        of_token = first_token * HV + head
        S = scan_step(S, q_ptr + (first_token * heads + key_head) * K, k_ptr + at_keys, w_ptr + at_keys,
                      n_ptr + at_keys if FREE else None, heads * K, v_ptr + at_values,
                      written_ptr + at_values if FREE else None, None if own_ptr is None else own_ptr + at_values,
                      A_ptr + of_token * C, X_ptr + at_scores, factors_ptr + head * NUM_FACTORS * tokens + start,
                      total_ptr + (chunk * HV + head) * (K if CHANNEL else 1),
                      None if o_ptr is None else o_ptr + of_token * V, None if y_ptr is None else y_ptr + at_values,
                      tokens, inside, token, reads, of_values, channels, columns, HV, K, V, CHANNEL, OWN, MODE, EXACT)
        chunk += 1
    if last_ptr is not None and has_values:
        store_tile(last_ptr + (segment * HV + head) * K * V, channels, V, columns, V, real, S)
    if transitions_ptr is not None and has_values == 0:
        store_tile(transitions_ptr + (segment * HV + head) * K * K, channels, K, columns, K, real, S)


@tuned(CONFIGS, ["K", "V", "CHANNEL", "OWN", "STEPS", "FIRST_STATES_ONLY", "EXACT", "full"], many=CONFIGS[1])
@triton.jit(do_not_specialize=["tokens", "full"])
def scan_back_kernel(q_ptr, k_ptr, w_ptr, do_ptr, A_ptr, X_ptr, factors_ptr, total_ptr, d_last_ptr, segments_ptr,
                     d_states_ptr, z_ptr, d_state_ptr, tokens, full, H, HV, K: tl.constexpr, V: tl.constexpr,
                     BK: tl.constexpr, BV: tl.constexpr, CHANNEL: tl.constexpr, OWN: tl.constexpr, STEPS: tl.constexpr,
                     FIRST_STATES_ONLY: tl.constexpr, EXACT: tl.constexpr):
    """Write the gradients of the states after every chunk [P, HV, K, V], Z [tokens, HV, V] and, unless None, the
    gradients of the states before segments [U, HV, K, V].

    FIRST_STATES_ONLY writes these last alone; with d_last None the gradient after every segment is zero.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    segment, first, end, chunk, head, v_block = locate_program(segments_ptr, HV, (V + BV - 1) // BV)
    key_head = head if CHANNEL else head // (HV // H)
    heads = HV if CHANNEL else H
    q_ptr += key_head * K
    k_ptr += key_head * K
    w_ptr += key_head * K
    factors_ptr += head * NUM_FACTORS * tokens
    i, channels, columns = tl.arange(0, C), tl.arange(0, BK), v_block * BV + tl.arange(0, BV)
    real = channels < K
    dS = tl.zeros([BK, BV], tl.float32)
    if d_last_ptr is not None:
        dS += load_tile(d_last_ptr + (segment * HV + head) * K * V, channels, V, columns, V, real).to(tl.float32)
    chunks = (end - first + C - 1) // C
    for step in range(chunks):
        number = chunks - 1 - step
        here = (chunk + number) * HV + head
        rows = first + number * C + i
        inside = rows < end
        if not FIRST_STATES_ONLY:
            store_tile(d_states_ptr + here * K * V, channels, V, columns, V, real, dS)
        first_token, token, _, reads = locate_tokens(first + number * C, inside, STEPS)
        token += first_token
        do = load_tile(do_ptr + head * V, token, HV * V, columns, V, reads)
        A = load_tile(A_ptr + head * C, token, HV * C, i, C, reads)
        X = load_tile(X_ptr + head * C, rows, HV * C, i, C, inside)
        w = load_tile(w_ptr, rows, heads * K, channels, K, inside)
        q = load_tile(q_ptr, token, heads * K, channels, K, reads)
        beta = tl.load(factors_ptr + BETA * tokens + rows, mask=inside, other=0.0)[:, None]
        D = tl.dot(w, dS.to(w.dtype), input_precision=PRECISION)
        if not CHANNEL:
            D *= tl.load(factors_ptr + WRITE * tokens + rows, mask=inside, other=0.0)[:, None]
        D = tl.dot(tl.trans(A), do, D, input_precision=PRECISION)
        Z = D - tl.dot(tl.trans(X), (beta * D).to(w.dtype), input_precision=PRECISION)
        if not FIRST_STATES_ONLY:
            store_tile(z_ptr + head * V, rows, HV * V, columns, V, inside, Z)
        minus_dR = -beta * Z
        if CHANNEL:
            k = load_tile(k_ptr, rows, heads * K, channels, K, inside)
            dS *= tl.load(total_ptr + here * K + channels, mask=real, other=0.0)[:, None]
            dS = tl.dot(tl.trans(q), do, dS, input_precision=PRECISION)
            dS = tl.dot(tl.trans(k), minus_dR.to(k.dtype), dS, input_precision=PRECISION)
        else:
            minus_dR *= tl.load(factors_ptr + KEY * tokens + rows, mask=inside, other=0.0)[:, None]
            read = do * tl.load(factors_ptr + QUERY * tokens + rows, mask=inside, other=0.0)[:, None]
            dS *= tl.load(total_ptr + here)
            dS = tl.dot(tl.trans(q), read.to(q.dtype), dS, input_precision=PRECISION)
            k = w
            if OWN:
                k = load_tile(k_ptr, rows, heads * K, channels, K, inside)
            dS = tl.dot(tl.trans(k), minus_dR.to(k.dtype), dS, input_precision=PRECISION)
    if d_state_ptr is not None:
        store_tile(d_state_ptr + (segment * HV + head) * K * V, channels, V, columns, V, real, dS)
