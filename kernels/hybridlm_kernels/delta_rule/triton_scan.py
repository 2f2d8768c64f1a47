"""The scans over chunks: states and outputs from first to last, and their gradients from last to first.

With S the state at the start of a chunk, Q, K, W its decayed queries, keys and writes, B = diag(beta):
    R = V - K S,  Y = R - X B R,  O = Q S + A B Y,  S' = diag(total) S + W^T B Y
and backward, D the gradient of B Y, Z = dY / B:
    D = A^T dO + W dS',  Z = D - X^T B D,  dS = diag(total) dS' + Q^T dO - K^T B Z
A program takes some columns of the values of one head of one document; documents come longest first.

Legend: N documents, H key heads, G value heads, K/V key/value head dim, C tokens a chunk, P chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_support import tuned
from ..triton_tiles import C, load_tile, store_tile
from .triton_chunk import BETA, FACTORS, KEY, QUERY, WRITE

CONFIGS = [triton.Config({"BV": values}, num_warps=warps, num_stages=stages)
           for values, warps, stages in ((16, 4, 2), (16, 4, 1), (32, 4, 1), (32, 4, 2), (64, 8, 2))]
KEY_OF_CONFIG = ["K", "V", "CHANNEL", "OUTPUT", "EXACT"]


@triton.jit
def place(documents_ptr, G, V_BLOCKS: tl.constexpr):
    """(document, first token, end, first chunk, head, block of values) of the program."""
    program = tl.program_id(0).to(tl.int64)
    row = documents_ptr + program // V_BLOCKS // G * 4
    return (tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), program // V_BLOCKS % G,
            program % V_BLOCKS)


@tuned(CONFIGS, KEY_OF_CONFIG)
@triton.jit
def scan_kernel(q_ptr, k_ptr, w_ptr, v_ptr, A_ptr, X_ptr, factors_ptr, total_ptr, state_ptr, documents_ptr, o_ptr,
                last_ptr, states_ptr, y_ptr, tokens, H, G, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                BV: tl.constexpr, CHANNEL: tl.constexpr, OUTPUT: tl.constexpr, EXACT: tl.constexpr):
    """OUTPUT: o [tokens, G, V] and the last states [N, G, K, V]. Else what the backward pass needs: the states at
    the start of every chunk [P, G, K, V] and Y [tokens, G, V]."""
    P: tl.constexpr = "ieee" if EXACT else "tf32"
    document, first, end, chunk, head, v_block = place(documents_ptr, G, (V + BV - 1) // BV)
    key_head = head if CHANNEL else head // (G // H)
    heads = G if CHANNEL else H
    q_ptr += key_head * K
    k_ptr += key_head * K
    w_ptr += key_head * K
    factors_ptr += head * FACTORS * tokens
    i, channels, columns = tl.arange(0, C), tl.arange(0, BK), v_block * BV + tl.arange(0, BV)
    real = channels < K
    S = tl.zeros([BK, BV], tl.float32)
    if state_ptr is not None:
        S += load_tile(state_ptr + (document * G + head) * K * V, channels, V, columns, V, real).to(tl.float32)
    for start in range(first, end, C):
        rows = start + i
        inside = rows < end
        k = load_tile(k_ptr, rows, heads * K, channels, K, inside)
        v = load_tile(v_ptr + head * V, rows, G * V, columns, V, inside).to(tl.float32)
        X = load_tile(X_ptr + head * C, rows, G * C, i, C, inside)
        beta = tl.load(factors_ptr + BETA * tokens + rows, mask=inside, other=0.0)[:, None]
        S_half = S.to(k.dtype)
        seen = tl.dot(k, S_half, input_precision=P)
        if not CHANNEL:
            seen *= tl.load(factors_ptr + KEY * tokens + rows, mask=inside, other=0.0)[:, None]
        R = v - seen
        Y = R - tl.dot(X, (beta * R).to(k.dtype), input_precision=P)
        if OUTPUT:
            q = load_tile(q_ptr, rows, heads * K, channels, K, inside)
            A = load_tile(A_ptr + head * C, rows, G * C, i, C, inside)
            o = tl.dot(q, S_half, input_precision=P)
            if not CHANNEL:
                o *= tl.load(factors_ptr + QUERY * tokens + rows, mask=inside, other=0.0)[:, None]
            o = tl.dot(A, (beta * Y).to(k.dtype), o, input_precision=P)
            store_tile(o_ptr + head * V, rows, G * V, columns, V, inside, o)
        else:
            store_tile(states_ptr + (chunk * G + head) * K * V, channels, V, columns, V, real, S)
            store_tile(y_ptr + head * V, rows, G * V, columns, V, inside, Y)
        written = beta * Y
        if CHANNEL:
            w = load_tile(w_ptr, rows, heads * K, channels, K, inside)
            S *= tl.load(total_ptr + (chunk * G + head) * K + channels, mask=real, other=0.0)[:, None]
            S = tl.dot(tl.trans(w), written.to(w.dtype), S, input_precision=P)
        else:
            written *= tl.load(factors_ptr + WRITE * tokens + rows, mask=inside, other=0.0)[:, None]
            S *= tl.load(total_ptr + chunk * G + head)
            S = tl.dot(tl.trans(k), written.to(k.dtype), S, input_precision=P)
        chunk += 1
    if OUTPUT:
        store_tile(last_ptr + (document * G + head) * K * V, channels, V, columns, V, real, S)


@tuned(CONFIGS, KEY_OF_CONFIG)
@triton.jit
def scan_back_kernel(q_ptr, k_ptr, w_ptr, do_ptr, A_ptr, X_ptr, factors_ptr, total_ptr, d_last_ptr, documents_ptr,
                     d_states_ptr, z_ptr, d_state_ptr, tokens, H, G, K: tl.constexpr, V: tl.constexpr,
                     BK: tl.constexpr, BV: tl.constexpr, CHANNEL: tl.constexpr, OUTPUT: tl.constexpr,
                     EXACT: tl.constexpr):
    """The gradients of the states after every chunk [P, G, K, V], Z [tokens, G, V] and, with OUTPUT, those of the
    initial states [N, G, K, V]."""
    P: tl.constexpr = "ieee" if EXACT else "tf32"
    document, first, end, chunk, head, v_block = place(documents_ptr, G, (V + BV - 1) // BV)
    key_head = head if CHANNEL else head // (G // H)
    heads = G if CHANNEL else H
    q_ptr += key_head * K
    k_ptr += key_head * K
    w_ptr += key_head * K
    factors_ptr += head * FACTORS * tokens
    i, channels, columns = tl.arange(0, C), tl.arange(0, BK), v_block * BV + tl.arange(0, BV)
    real = channels < K
    dS = load_tile(d_last_ptr + (document * G + head) * K * V, channels, V, columns, V, real).to(tl.float32)
    chunks = (end - first + C - 1) // C
    for step in range(chunks):
        number = chunks - 1 - step
        here = (chunk + number) * G + head
        rows = first + number * C + i
        inside = rows < end
        store_tile(d_states_ptr + here * K * V, channels, V, columns, V, real, dS)
        do = load_tile(do_ptr + head * V, rows, G * V, columns, V, inside)
        A = load_tile(A_ptr + head * C, rows, G * C, i, C, inside)
        X = load_tile(X_ptr + head * C, rows, G * C, i, C, inside)
        w = load_tile(w_ptr, rows, heads * K, channels, K, inside)
        q = load_tile(q_ptr, rows, heads * K, channels, K, inside)
        beta = tl.load(factors_ptr + BETA * tokens + rows, mask=inside, other=0.0)[:, None]
        D = tl.dot(w, dS.to(w.dtype), input_precision=P)
        if not CHANNEL:
            D *= tl.load(factors_ptr + WRITE * tokens + rows, mask=inside, other=0.0)[:, None]
        D = tl.dot(tl.trans(A), do, D, input_precision=P)
        Z = D - tl.dot(tl.trans(X), (beta * D).to(w.dtype), input_precision=P)
        store_tile(z_ptr + head * V, rows, G * V, columns, V, inside, Z)
        minus_dR = -beta * Z
        if CHANNEL:
            k = load_tile(k_ptr, rows, heads * K, channels, K, inside)
            dS *= tl.load(total_ptr + here * K + channels, mask=real, other=0.0)[:, None]
            dS = tl.dot(tl.trans(q), do, dS, input_precision=P)
            dS = tl.dot(tl.trans(k), minus_dR.to(k.dtype), dS, input_precision=P)
        else:
            minus_dR *= tl.load(factors_ptr + KEY * tokens + rows, mask=inside, other=0.0)[:, None]
            read = do * tl.load(factors_ptr + QUERY * tokens + rows, mask=inside, other=0.0)[:, None]
            dS *= tl.load(total_ptr + here)
            dS = tl.dot(tl.trans(q), read.to(q.dtype), dS, input_precision=P)
            dS = tl.dot(tl.trans(w), minus_dR.to(w.dtype), dS, input_precision=P)
    if OUTPUT:
        store_tile(d_state_ptr + (document * G + head) * K * V, channels, V, columns, V, real, dS)
