"""The recurrence token by token, for decoding: the state is read once and written once.

Legend: B rows, T tokens a row, H key heads, G value heads, K/V key/value head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_tiles import gate_bias, gate_rate, gate_value, load_tile, store_tile


@triton.jit
def decode_kernel(q_ptr, k_ptr, v_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant, state_ptr, o_ptr, last_ptr, scale, T,
                  H, G, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
                  GATE: tl.constexpr):
    """o [B, T, G, V] and the states [B, G, K, V] after the last token; some columns of the state a program."""
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    v_block, head, batch = program % V_BLOCKS, program // V_BLOCKS % G, program // V_BLOCKS // G
    channels, columns = tl.arange(0, BK), v_block * BV + tl.arange(0, BV)
    real = channels < K
    at_state = (batch * G + head) * K * V
    S = tl.zeros([BK, BV], tl.float32)
    if state_ptr is not None:
        S += load_tile(state_ptr + at_state, channels, V, columns, V, real).to(tl.float32)
    rate = gate_rate(A_log_ptr, head)
    for t in range(T):
        token = batch * T + t
        key_at = (token * H + head // (G // H)) * K + channels
        q = tl.load(q_ptr + key_at, mask=real, other=0.0).to(tl.float32) * scale
        k = tl.load(k_ptr + key_at, mask=real, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + (token * G + head) * V + columns, mask=columns < V, other=0.0).to(tl.float32)
        if DECAY == "constant":
            S *= tl.exp(tl.load(g_ptr + head).to(tl.float32))
        if DECAY == "head":
            bias = gate_bias(bias_ptr, head)
            S *= tl.exp(gate_value(tl.load(g_ptr + token * G + head), rate, bias, gate_constant, GATE))
        if DECAY == "channel":
            u = tl.load(g_ptr + (token * G + head) * K + channels, mask=real, other=0.0)
            bias = tl.zeros([BK], tl.float32)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + head * K + channels, mask=real, other=0.0).to(tl.float32)
            S *= tl.exp(gate_value(u, rate, bias, gate_constant, GATE))[:, None]
        S += k[:, None] * v[None, :]
        o = tl.sum(S * q[:, None], axis=0)
        tl.store(o_ptr + (token * G + head) * V + columns, o.to(o_ptr.dtype.element_ty), mask=columns < V)
    store_tile(last_ptr + at_state, channels, V, columns, V, real, S)
