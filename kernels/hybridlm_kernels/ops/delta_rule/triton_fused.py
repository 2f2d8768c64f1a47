"""Chunks and their scan in one launch: one program a document and head.

What `triton_chunk.py` finds of a chunk is written for the backward pass and read again at once. The state goes through
memory from chunk to chunk, some columns of the values at a time, so that registers hold one chunk's scores or one block
of the state and never both; memory here is the cache. With a decay a channel so do the decayed queries, keys and writes
of one chunk.

Legend: N documents, H key heads, G value heads, K/V key/value head dim, C tokens a chunk, P chunks.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from hybridlm_kernels.ops.delta_rule.triton_chunk import FACTORS, prepare
from hybridlm_kernels.ops.delta_rule.triton_scan import place, scan_step
from hybridlm_kernels.recurrence.triton_tiles import C, load_tile, store_tile
from hybridlm_kernels.triton_support import tuned


@triton.jit
def _fused(q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, state_ptr, documents_ptr, A_ptr, X_ptr,
           factors_ptr, total_ptr, scratch_ptr, o_ptr, last_ptr, scale, gate_constant, beta_scale, tokens, H, G,
           K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PADDED: tl.constexpr,
           DECAY: tl.constexpr, GATE: tl.constexpr, L2NORM: tl.constexpr, SIGMOID: tl.constexpr, MERGED: tl.constexpr,
           EXACT: tl.constexpr):
    """o [tokens, G, V], the last states [N, G, K, V], and A, X, factors and total as `chunk_kernel` writes them.
    `scratch` is [N G, 3, C, K], or None unless the decay is one a channel. PADDED is K as a power of two."""
    CHANNEL: tl.constexpr = DECAY == "channel"
    document, first, end, chunk, head, _ = place(documents_ptr, G, 1)
    queries_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * 3 * C * K if CHANNEL else None
    keys_ptr = queries_ptr + C * K if CHANNEL else None
    writes_ptr = keys_ptr + C * K if CHANNEL else None
    t, channels = tl.arange(0, C), tl.arange(0, PADDED)
    real = channels < K
    last_ptr += (document * G + head) * K * V
    for v0 in range(0, V, BV):
        columns = v0 + tl.arange(0, BV)
        S = tl.zeros([PADDED, BV], tl.float32)
        if state_ptr is not None:
            S += load_tile(state_ptr + (document * G + head) * K * V, channels, V, columns, V, real).to(tl.float32)
        store_tile(last_ptr, channels, V, columns, V, real, S)
    for start in tl.range(first, end, C, num_stages=1, disable_licm=True):  # else addresses fill the registers
        filled = tl.minimum(end - start, C)
        inside = t < filled
        for side in tl.range(0, 2, loop_unroll_factor=1, num_stages=1, disable_licm=True):
            prepare(q_ptr, k_ptr, g_ptr, beta_ptr, A_log_ptr, bias_ptr, A_ptr, X_ptr, factors_ptr, total_ptr,
                    queries_ptr, keys_ptr, writes_ptr, K, scale, gate_constant, beta_scale, tokens, H, G, chunk, head,
                    start, filled, side == 1, K, BK, DECAY, GATE, L2NORM, SIGMOID, True, MERGED, EXACT)
        tl.debug_barrier()
        at_keys, at_head = (start * H + head // (G // H)) * K, start * G + head
        for v0 in tl.range(0, V, BV, num_stages=1, disable_licm=True):
            columns = v0 + tl.arange(0, BV)
            S = load_tile(last_ptr, channels, V, columns, V, real)
            S = scan_step(S, queries_ptr if CHANNEL else q_ptr + at_keys, keys_ptr if CHANNEL else k_ptr + at_keys,
                          writes_ptr if CHANNEL else k_ptr + at_keys, K if CHANNEL else H * K, v_ptr + at_head * V,
                          A_ptr + at_head * C, X_ptr + at_head * C, factors_ptr + head * FACTORS * tokens + start,
                          total_ptr + (chunk * G + head) * (K if CHANNEL else 1), o_ptr + at_head * V, None, tokens,
                          inside, inside, channels, columns, G, K, V, CHANNEL, "outputs", EXACT)
            store_tile(last_ptr, channels, V, columns, V, real, S)
        tl.debug_barrier()
        chunk += 1


def _with_warps(warps: int) -> Any:
    return tuned([triton.Config({"BK": 16, "BV": values}, num_warps=warps, num_stages=1) for values in (32, 16)],
                 ["K", "V", "DECAY", "MERGED", "EXACT"])(_fused)


fused_kernel = _with_warps(4)  # no decay, or one a head: spills with 8
fused_channel_kernel = _with_warps(8)  # spills with 4
