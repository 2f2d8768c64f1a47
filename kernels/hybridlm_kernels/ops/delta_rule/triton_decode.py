"""The recurrence itself, token by token, for decoding: registers hold the state of some columns of the values.

Legend: N documents, H key heads, HV value heads, K/V key/value head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_chunk import write_strength
from hybridlm_kernels.ops.delta_rule.triton_scan import locate_program
from hybridlm_kernels.recurrence.triton_tiles import gate_rate, gate_value, load_tile, store_tile


@triton.jit
def _load_row(ptr, columns, WIDTH: tl.constexpr):
    return tl.load(ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def decode_kernel(q_ptr, p_ptr, k_ptr, value_keys_ptr, v_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, state_ptr,
                  documents_ptr, o_ptr, last_ptr, scale, gate_constant, beta_scale, H, HV, K: tl.constexpr,
                  V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
                  L2NORM: tl.constexpr, SIGMOID: tl.constexpr, BEFORE: tl.constexpr):
    """Write o [tokens, HV, V] and the last states [N, HV, K, V]; one program per document, head and block of values.

    Erase keys `p_ptr` and value keys are None where they are the keys.
    """
    document, first, end, _, head, v_block = locate_program(documents_ptr, HV, (V + BV - 1) // BV)
    channels, columns = tl.arange(0, BK), v_block * BV + tl.arange(0, BV)
    key_head = head // (HV // H)
    width: tl.constexpr = K if DECAY == "channel" else 1  # gates per token and head
    offset = channels if DECAY == "channel" else tl.zeros([1], tl.int32)
    at_state = (document * HV + head) * K * V
    S = tl.zeros([BK, BV], tl.float32)
    if state_ptr is not None:
        S += load_tile(state_ptr + at_state, channels, V, columns, V, channels < K).to(tl.float32)
    rate, bias = gate_rate(A_log_ptr, head), tl.zeros([1], tl.float32)
    if bias_ptr is not None:
        bias = _load_row(bias_ptr + head * width, offset, width)
    for t in range(first, end):
        q = _load_row(q_ptr + (t * H + key_head) * K, channels, K)
        k = _load_row(k_ptr + (t * H + key_head) * K, channels, K)
        v = _load_row(v_ptr + (t * HV + head) * V, columns, V)
        if L2NORM:
            q *= tl.rsqrt(tl.sum(q * q) + 1e-6)
            k *= tl.rsqrt(tl.sum(k * k) + 1e-6)
        p = k
        if p_ptr is not None:
            p = _load_row(p_ptr + (t * H + key_head) * K, channels, K)
        seen = tl.zeros([BV], tl.float32)
        if BEFORE:
            seen = tl.sum(S * p[:, None], axis=0)
        if DECAY != "none":
            u = _load_row(g_ptr + (t * HV + head) * width, offset, width)
            S *= tl.exp(gate_value(u, rate, bias, gate_constant, GATE))[:, None]
        beta = write_strength(beta_ptr, t * HV + head, t < end, beta_scale, SIGMOID)
        if not BEFORE:
            seen = tl.sum(S * p[:, None], axis=0)
        if value_keys_ptr is not None:
            value_key = _load_row(value_keys_ptr + (t * H + key_head) * K, channels, K)
            S += value_key[:, None] * v[None, :] - k[:, None] * (beta * seen)[None, :]
        else:
            S += k[:, None] * (beta * (v - seen))[None, :]
        o = scale * tl.sum(S * q[:, None], axis=0)
        tl.store(o_ptr + (t * HV + head) * V + columns, o.to(o_ptr.dtype.element_ty), mask=columns < V)
    store_tile(last_ptr + at_state, channels, V, columns, V, channels < K, S)
