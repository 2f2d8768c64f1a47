"""Scans that are split: the states that pieces of a document start from, out of what every piece does by itself.

A piece takes the state S it starts from to M S + N. N is the state it ends with when it starts from zero; M, the
product of its transitions, is a number a head, one a channel or a matrix.

Legend: N documents, U pieces, G heads, Y/Z dims of a state, BZ columns of it a program.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_tiles import load_tile, store_tile
from hybridlm_kernels.triton_support import CompileCase


@triton.jit
def join_kernel(states_ptr, transitions_ptr, start_ptr, pieces_of_documents_ptr, last_ptr, G, Y: tl.constexpr,
                Z: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, TRANSITION: tl.constexpr, REVERSE: tl.constexpr,
                EXACT: tl.constexpr):
    """From N of every piece [U, G, Y, Z] to the state it starts from, in place; start and last are the states
    [N, G, Y, Z] before and behind whole documents.

    Transitions are [U, G] ("head"), [U, G, Y] ("channel") or [U, G, Y, Y] ("matrix"). REVERSE goes from the last piece
    to the first, with transposed matrices: gradients.
    """
    P: tl.constexpr = "ieee" if EXACT else "tf32"
    BLOCK: tl.constexpr = 32
    Z_BLOCKS: tl.constexpr = (Z + BZ - 1) // BZ
    program = tl.program_id(0).to(tl.int64)
    head, document = program // Z_BLOCKS % G, program // Z_BLOCKS // G
    dims, columns = tl.arange(0, BY), program % Z_BLOCKS * BZ + tl.arange(0, BZ)
    real = dims < Y
    S = tl.zeros([BY, BZ], tl.float32)
    if start_ptr is not None:
        S += load_tile(start_ptr + (document * G + head) * Y * Z, dims, Z, columns, Z, real).to(tl.float32)
    first, end = tl.load(pieces_of_documents_ptr + document * 2), tl.load(pieces_of_documents_ptr + document * 2 + 1)
    for step in range(end - first):
        here = (end - 1 - step if REVERSE else first + step) * G + head
        state_ptr = states_ptr + here * Y * Z
        alone = load_tile(state_ptr, dims, Z, columns, Z, real)
        store_tile(state_ptr, dims, Z, columns, Z, real, S)
        if TRANSITION == "matrix":
            tl.debug_barrier()  # other threads read the state that was just written
            M_ptr = transitions_ptr + here * Y * Y
            S = alone
            for y0 in range(0, Y, BLOCK):
                some = y0 + tl.arange(0, BLOCK)
                at = some[None, :] * Y + dims[:, None] if REVERSE else dims[:, None] * Y + some[None, :]
                M = tl.load(M_ptr + at, mask=real[:, None] & (some < Y)[None, :], other=0.0)
                part = load_tile(state_ptr, some, Z, columns, Z, some < Y)
                S = tl.dot(M, part, S, input_precision=P)
        elif TRANSITION == "channel":
            S = S * tl.load(transitions_ptr + here * Y + dims, mask=real, other=0.0)[:, None] + alone
        else:
            S = S * tl.load(transitions_ptr + here) + alone
    store_tile(last_ptr + (document * G + head) * Y * Z, dims, Z, columns, Z, real, S)


def compile_case(D: int, transition: str) -> CompileCase:
    """For the compile check of the operations that split scans: heads of D channels."""
    types = dict.fromkeys(("states_ptr", "transitions_ptr", "start_ptr", "last_ptr"), "*fp32")
    constants: dict[str, Any] = {"Y": D, "Z": D, "BY": D, "BZ": 32, "TRANSITION": transition, "REVERSE": True,
                                 "EXACT": False}
    return CompileCase(f"join D={D}", join_kernel, types | {"pieces_of_documents_ptr": "*i64", "G": "i32"}, constants,
                    head_dim=D)
