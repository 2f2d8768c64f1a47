"""Sorting (token, expert) pairs by expert and bringing results back, without a wait for the device and without atomics.

N tokens, A experts per token, P = N A pairs, E experts, D model width. A pair's number is n A + a; its row is its place
in the order by expert, where pairs of one expert keep their order. A tile is up to BLOCK_M rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.triton_support import CompileCase

PAIRS_PER_PROGRAM = 128  # pairs that one program counts and places


@dataclass(frozen=True)
class Routes:
    """Row of every pair and the tiles of every expert, on the device.

    The number of tiles depends on the routing and is known to the device alone: as many as there could be are launched,
    and those that do not exist name expert E.
    """

    slot_NA: Tensor  # int32: row of each pair
    pair_P: Tensor  # int32: pair in each row
    end_E: Tensor  # int64: row after the last of each expert
    tile_expert: Tensor  # int32
    tile_row: Tensor  # int32: first row
    block_m: int

    @property
    def tiles(self) -> int:
        return self.tile_expert.numel()


@triton.jit
def _count(ids_ptr, count_ptr, P, BLOCKS, E, PAIRS: tl.constexpr, BLOCK_E: tl.constexpr):
    """count[e, block]: how many of the block's pairs go to expert e."""
    block = tl.program_id(0).to(tl.int64)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    ids = tl.load(ids_ptr + pair, mask=pair < P, other=-1)
    for first in range(0, E, BLOCK_E):
        expert = first + tl.arange(0, BLOCK_E)
        count = tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), axis=0)
        tl.store(count_ptr + expert.to(tl.int64) * BLOCKS + block, count, mask=expert < E)


@triton.jit
def _place(ids_ptr, count_ptr, end_ptr, slot_ptr, pair_ptr, P, BLOCKS, PAIRS: tl.constexpr):
    """A pair's row: the pairs of smaller experts, those of its own in earlier blocks, those before it in its block."""
    block = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, PAIRS)
    pair = block * PAIRS + within
    ids = tl.load(ids_ptr + pair, mask=pair < P, other=-1)
    before = (ids[:, None] == ids[None, :]) & (within[:, None] > within[None, :])
    at = ids.to(tl.int64) * BLOCKS + block
    first = tl.load(end_ptr + at, mask=pair < P, other=0) - tl.load(count_ptr + at, mask=pair < P, other=0)
    row = first + tl.sum(before.to(tl.int32), axis=1)
    tl.store(slot_ptr + pair, row.to(tl.int32), mask=pair < P)
    tl.store(pair_ptr + row, pair.to(tl.int32), mask=pair < P)


@triton.jit(do_not_specialize=["tiles"])
def _tile_table(end_ptr, expert_ptr, row_ptr, tiles, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
                TILES: tl.constexpr):
    """Tile t belongs to the expert before which fewer than t + 1 tiles end."""
    expert = tl.arange(0, BLOCK_E)
    end = tl.load(end_ptr + expert, mask=expert < E, other=0).to(tl.int32)
    start = tl.load(end_ptr + expert - 1, mask=(expert > 0) & (expert < E), other=0).to(tl.int32)
    need = (end - start + BLOCK_M - 1) // BLOCK_M
    need = tl.where(expert < E, need, 0)
    last = tl.cumsum(need, axis=0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    own = ((tile[:, None] < last[None, :]) & (tile[:, None] >= (last - need)[None, :])).to(tl.int32)
    found = tl.sum(own, axis=1)
    expert_T = tl.where(found > 0, tl.sum(own * expert[None, :], axis=1), E)
    row_T = tl.sum(own * (start - (last - need) * BLOCK_M)[None, :], axis=1) + tile * BLOCK_M * found
    tl.store(expert_ptr + tile, expert_T, mask=tile < tiles)
    tl.store(row_ptr + tile, row_T, mask=tile < tiles)


@triton.jit
def _gather_sum(rows_ptr, slot_ptr, y_ptr, N, A: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                TOKENS: tl.constexpr):
    """y[n] = sum over a of rows[slot[n, a]], in the order of a."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (token < N)[:, None] & (column < D)[None, :]
    total = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    for a in range(A):
        slot = tl.load(slot_ptr + token * A + a, mask=token < N, other=0).to(tl.int64)
        total += tl.load(rows_ptr + slot[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token[:, None] * D + column[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


def sort_by_expert(expert_ids_NA: Tensor, experts: int) -> Routes:
    """A stable counting sort of the pairs by expert, and the tiles of every expert."""
    ids_NA, device = expert_ids_NA.contiguous(), expert_ids_NA.device
    P, E = ids_NA.numel(), experts
    blocks = max(1, triton.cdiv(P, PAIRS_PER_PROGRAM))
    count_EB = torch.empty(E, blocks, dtype=torch.int32, device=device)
    _count[(blocks,)](
        ids_ptr=ids_NA, count_ptr=count_EB, P=P, BLOCKS=blocks, E=E, PAIRS=PAIRS_PER_PROGRAM,
        BLOCK_E=min(64, triton.next_power_of_2(E)))
    end_EB = count_EB.flatten().cumsum(0).view(E, blocks)
    slot_NA = torch.empty(ids_NA.shape, dtype=torch.int32, device=device)
    pair_P = torch.empty(P, dtype=torch.int32, device=device)
    _place[(blocks,)](
        ids_ptr=ids_NA, count_ptr=count_EB, end_ptr=end_EB, slot_ptr=slot_NA, pair_ptr=pair_P, P=P, BLOCKS=blocks,
        PAIRS=PAIRS_PER_PROGRAM)
    end_E = end_EB[:, -1].contiguous()
    block_m = 128 if P > 64 * E else 64 if P > 16 * E else 16  # near the mean group, so that few rows are idle
    tiles = P // block_m + min(E, P)
    tile_expert, tile_row = torch.empty(2, tiles, dtype=torch.int32, device=device)
    block_e = triton.next_power_of_2(E)
    tiles_per_program = max(8, 8192 // block_e)
    _tile_table[(triton.cdiv(tiles, tiles_per_program),)](
        end_ptr=end_E, expert_ptr=tile_expert, row_ptr=tile_row, tiles=tiles, E=E, BLOCK_M=block_m, BLOCK_E=block_e,
        TILES=tiles_per_program)
    return Routes(slot_NA, pair_P, end_E, tile_expert, tile_row, block_m)


def gather_sum(rows_PD: Tensor, slot_NA: Tensor) -> Tensor:
    """[N, D]: the sum of each token's rows."""
    (N, A), D = slot_NA.shape, rows_PD.shape[1]
    y_ND = torch.empty(N, D, dtype=rows_PD.dtype, device=rows_PD.device)
    block = min(1024, triton.next_power_of_2(D))
    tokens = 2048 // block
    _gather_sum[(triton.cdiv(N, tokens), triton.cdiv(D, block))](
        rows_ptr=rows_PD, slot_ptr=slot_NA, y_ptr=y_ND, N=N, A=A, D=D, BLOCK_D=block, TOKENS=tokens)
    return y_ND


_I32 = dict.fromkeys(("P", "BLOCKS", "E", "tiles", "N"), "i32")
_POINTERS = {"ids_ptr": "*i64", "count_ptr": "*i32", "end_ptr": "*i64", "slot_ptr": "*i32", "pair_ptr": "*i32",
             "expert_ptr": "*i32", "row_ptr": "*i32", "rows_ptr": "*bf16", "y_ptr": "*bf16"}


def _compile_case(kernel, **constants: int) -> CompileCase:
    types = {name: kind for name, kind in (_I32 | _POINTERS).items() if name in kernel.arg_names}
    return CompileCase(kernel.__name__.strip("_").replace("_", " "), kernel, types, constants)


COMPILE_CASES = [_compile_case(_count, PAIRS=PAIRS_PER_PROGRAM, BLOCK_E=64),
                 _compile_case(_place, PAIRS=PAIRS_PER_PROGRAM),
                 _compile_case(_tile_table, BLOCK_M=128, BLOCK_E=256, TILES=32),
                 _compile_case(_gather_sum, A=8, D=2048, BLOCK_D=1024, TOKENS=2)]
