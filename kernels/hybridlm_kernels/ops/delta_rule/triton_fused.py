"""Chunks and their scan in one launch: one program per document and head.

What `triton_chunk.py` finds of a chunk is written for the backward pass and read back at once. The state goes from
chunk to chunk through memory (the cache), some columns of the values at a time, so that registers hold one chunk's
scores or one block of the state and never both. With a decay per channel the decayed queries, keys and writes of one
chunk go through memory too.

Legend: N documents, H key heads, HV value heads, K/V key/value head dim, C tokens per chunk, P chunks.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_chunk import NUM_FACTORS, prepare
from hybridlm_kernels.ops.delta_rule.triton_scan import locate_program, scan_step
from hybridlm_kernels.recurrence.triton_tiles import C, load_tile, store_tile
from hybridlm_kernels.triton_support import tuned


@triton.jit
def _fused(q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, state_ptr, documents_ptr, A_ptr, X_ptr,
           factors_ptr, total_ptr, scratch_ptr, o_ptr, last_ptr, scale, gate_constant, beta_scale, tokens, H, HV,
           K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PADDED_K: tl.constexpr,
           DECAY: tl.constexpr, GATE: tl.constexpr, L2NORM: tl.constexpr, SIGMOID: tl.constexpr, MERGED: tl.constexpr,
           EXACT: tl.constexpr):
    """Write o [tokens, HV, V], the last states [N, HV, K, V], and A, X, factors and total as `chunk_kernel` does.

    `scratch` is [N HV, 3, C, K] with a decay per channel, else None. PADDED_K is K rounded up to a power of two.
    """
    CHANNEL: tl.constexpr = DECAY == "channel"
    document, first, end, chunk, head, _ = locate_program(documents_ptr, HV, 1)
    queries_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * 3 * C * K if CHANNEL else None
    keys_ptr = queries_ptr + C * K if CHANNEL else None
    writes_ptr = keys_ptr + C * K if CHANNEL else None
    t, channels = tl.arange(0, C), tl.arange(0, PADDED_K)
    real = channels < K
    last_ptr += (document * HV + head) * K * V
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        S = tl.zeros([PADDED_K, BV], tl.float32)
        if state_ptr is not None:
            S += load_tile(state_ptr + (document * HV + head) * K * V, channels, V, columns, V, real).to(tl.float32)
        store_tile(last_ptr, channels, V, columns, V, real, S)
    for start in tl.range(first, end, C, num_stages=1, disable_licm=True):  # LICM fills the registers
        filled = tl.minimum(end - start, C)
        inside = t < filled
        for side in tl.range(0, 2, loop_unroll_factor=1, num_stages=1, disable_licm=True):
            prepare(q_ptr, k_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, A_ptr, X_ptr, factors_ptr, total_ptr,
                    queries_ptr, keys_ptr, writes_ptr, K, scale, gate_constant, beta_scale, tokens, H, HV, chunk, head,
                    start, filled, side == 1, K, BK, DECAY, GATE, L2NORM, SIGMOID, True, MERGED, EXACT)
        tl.debug_barrier()
        at_keys, at_head = (start * H + head // (HV // H)) * K, start * HV + head
        for v0 in tl.range(0, V, BV, num_stages=1, disable_licm=True):
            columns = v0 + tl.arange(0, BV)
            S = load_tile(last_ptr, channels, V, columns, V, real)
            S = scan_step(S, queries_ptr if CHANNEL else q_ptr + at_keys, keys_ptr if CHANNEL else k_ptr + at_keys,
                          writes_ptr if CHANNEL else k_ptr + at_keys, K if CHANNEL else H * K, v_ptr + at_head * V,
                          A_ptr + at_head * C, X_ptr + at_head * C, factors_ptr + head * NUM_FACTORS * tokens + start,
                          total_ptr + (chunk * HV + head) * (K if CHANNEL else 1), o_ptr + at_head * V, None, tokens,
                          inside, inside, channels, columns, HV, K, V, CHANNEL, "outputs", EXACT)
            store_tile(last_ptr, channels, V, columns, V, real, S)
        tl.debug_barrier()
        chunk += 1


def _with_warps(warps: int) -> Any:
    return tuned([triton.Config({"BK": 16, "BV": values}, num_warps=warps, num_stages=1) for values in (32, 16)],
                 ["K", "V", "DECAY", "MERGED", "EXACT"])(_fused)


fused_kernel = _with_warps(4)  # for no decay or a scalar decay: spills with 8 warps
fused_channel_kernel = _with_warps(8)  # spills with 4 warps
