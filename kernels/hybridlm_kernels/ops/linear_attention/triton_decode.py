"""The recurrence token by token, for decoding: the state is read once and written once.

Legend: B rows, T tokens per row, H key heads, HV value heads, K/V key/value head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_tiles import gate_bias, gate_rate, gate_value, load_tile, store_tile


@triton.jit
def decode_kernel(q_ptr, k_ptr, v_ptr, g_ptr, A_log_ptr, bias_ptr, gate_constant, state_ptr, o_ptr, last_ptr, scale, T,
                  H, HV, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
                  GATE: tl.constexpr):
    """Write o [B, T, HV, V] and the last states [B, HV, K, V]; one program per row, head and block of values."""
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    v_block, head, batch = program % V_BLOCKS, program // V_BLOCKS % HV, program // V_BLOCKS // HV
    channels, columns = tl.arange(0, BK), v_block * BV + tl.arange(0, BV)
    real = channels < K
    at_state = (batch * HV + head) * K * V
    S = tl.zeros([BK, BV], tl.float32)
    if state_ptr is not None:
        S += load_tile(state_ptr + at_state, channels, V, columns, V, real).to(tl.float32)
    rate = gate_rate(A_log_ptr, head)
    for t in range(T):
        token = batch * T + t
        key_at = (token * H + head // (HV // H)) * K + channels
        q = tl.load(q_ptr + key_at, mask=real, other=0.0).to(tl.float32) * scale
        k = tl.load(k_ptr + key_at, mask=real, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + (token * HV + head) * V + columns, mask=columns < V, other=0.0).to(tl.float32)
        if DECAY == "constant":
            S *= tl.exp(tl.load(g_ptr + head).to(tl.float32))
        if DECAY == "scalar":
            bias = gate_bias(bias_ptr, head)
            S *= tl.exp(gate_value(tl.load(g_ptr + token * HV + head), rate, bias, gate_constant, GATE))
        if DECAY == "channel":
            u = tl.load(g_ptr + (token * HV + head) * K + channels, mask=real, other=0.0)
            bias = tl.zeros([BK], tl.float32)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + head * K + channels, mask=real, other=0.0).to(tl.float32)
            S *= tl.exp(gate_value(u, rate, bias, gate_constant, GATE))[:, None]
        S += k[:, None] * v[None, :]
        o = tl.sum(S * q[:, None], axis=0)
        tl.store(o_ptr + (token * HV + head) * V + columns, o.to(o_ptr.dtype.element_ty), mask=columns < V)
    store_tile(last_ptr + at_state, channels, V, columns, V, real, S)
