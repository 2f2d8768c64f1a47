"""States between the segments of a document, whose scans ran side by side, each from a state of zero.

A segment takes the state S before it to M S + N. N is the state it ends with when it starts from zero; M, the product
of its transitions, is one number per head, one number per channel, or a matrix.

Legend: N documents, U segments, HV value heads, Y/Z dims of a state, BZ columns of it per program.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_tiles import load_tile, store_tile
from hybridlm_kernels.triton_support import CompileCase


@triton.jit
def join_kernel(states_ptr, transitions_ptr, start_ptr, segments_of_documents_ptr, last_ptr, HV, Y: tl.constexpr,
                Z: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, TRANSITION: tl.constexpr, REVERSE: tl.constexpr,
                EXACT: tl.constexpr):
    """Replace N of every segment [U, HV, Y, Z] by the state before it; start and last [N, HV, Y, Z] are the states
    before and after the documents; None for zero, and for not wanted.

    Transitions M are [U, HV] ("scalar"), [U, HV, Y] ("channel") or [U, HV, Y, Y] ("matrix"). REVERSE goes from the last
    segment to the first with transposed matrices, as gradients do.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    BLOCK: tl.constexpr = 32
    Z_BLOCKS: tl.constexpr = (Z + BZ - 1) // BZ
    program = tl.program_id(0).to(tl.int64)
    head, document = program // Z_BLOCKS % HV, program // Z_BLOCKS // HV
    dims, columns = tl.arange(0, BY), program % Z_BLOCKS * BZ + tl.arange(0, BZ)
    real = dims < Y
    S = tl.zeros([BY, BZ], tl.float32)
    if start_ptr is not None:
        S += load_tile(start_ptr + (document * HV + head) * Y * Z, dims, Z, columns, Z, real).to(tl.float32)
    first = tl.load(segments_of_documents_ptr + document * 2)
    end = tl.load(segments_of_documents_ptr + document * 2 + 1)
    for step in range(end - first):
        here = (end - 1 - step if REVERSE else first + step) * HV + head
        state_ptr = states_ptr + here * Y * Z
        from_zero = load_tile(state_ptr, dims, Z, columns, Z, real)
        store_tile(state_ptr, dims, Z, columns, Z, real, S)
        if TRANSITION == "matrix":
            tl.debug_barrier()  # other threads read the state that was just written
            M_ptr = transitions_ptr + here * Y * Y
            S = from_zero
            for y0 in range(0, Y, BLOCK):
                block = y0 + tl.arange(0, BLOCK)
                at = block[None, :] * Y + dims[:, None] if REVERSE else dims[:, None] * Y + block[None, :]
                M = tl.load(M_ptr + at, mask=real[:, None] & (block < Y)[None, :], other=0.0)
                rows = load_tile(state_ptr, block, Z, columns, Z, block < Y)
                S = tl.dot(M, rows, S, input_precision=PRECISION)
        elif TRANSITION == "channel":
            S = S * tl.load(transitions_ptr + here * Y + dims, mask=real, other=0.0)[:, None] + from_zero
        else:
            S = S * tl.load(transitions_ptr + here) + from_zero
    if last_ptr is not None:
        store_tile(last_ptr + (document * HV + head) * Y * Z, dims, Z, columns, Z, real, S)


def compile_case(D: int, transition: str) -> CompileCase:
    """The join kernel for heads of D channels, for the compile check of the operations that scan in segments."""
    types = dict.fromkeys(("states_ptr", "transitions_ptr", "start_ptr", "last_ptr"), "*fp32")
    constants: dict[str, Any] = {"Y": D, "Z": D, "BY": D, "BZ": 32, "TRANSITION": transition, "REVERSE": True,
                                 "EXACT": False}
    types |= {"segments_of_documents_ptr": "*i64", "HV": "i32"}
    return CompileCase(f"join D={D}", join_kernel, types, constants, head_dim=D)
