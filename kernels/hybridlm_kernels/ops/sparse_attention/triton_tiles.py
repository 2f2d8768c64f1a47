"""Parts that the kernels of attention over selected keys share: rows, one step of the softmax, sizes of tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hybridlm_kernels.triton_support import tuned

LOG2_E = 1.4426950408889634


def tuned_by_listed(*sizes: tuple[int, int, int]):
    """Decorator that tunes a kernel over (listed places of a block, warps, stages), the first the default."""
    return tuned([triton.Config({"BLOCK_N": n}, num_warps=warps, num_stages=stages) for n, warps, stages in sizes],
                 key=["H", "G", "K", "V"])


@triton.jit
def load_rows(ptr, offset, inside, column, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads [rows, columns] at element offsets of rows, zeros outside; `column` counts from FIRST up to COLUMNS."""
    if FIRST + column.shape[0] <= COLUMNS:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (column < COLUMNS)[None, :]
    return tl.load(ptr + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, offset, inside, column, FIRST: tl.constexpr, COLUMNS: tl.constexpr, value):
    """Stores [rows, columns] at element offsets of rows, the reverse of `load_rows`."""
    if FIRST + column.shape[0] <= COLUMNS:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (column < COLUMNS)[None, :]
    tl.store(ptr + offset[:, None] + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def heads_of(program, H, G, BLOCK_H: tl.constexpr):
    """Key head of a program, the first of its query heads, the places of these in the tile, and which of them exist.

    The first is one number per program, so that places of rows are a base and small offsets: rows of 64-bit places,
    kept for the stores at the end, would cost the registers that wide heads lack.
    """
    tiles = tl.cdiv(H // G, BLOCK_H)
    first, row = program % tiles * BLOCK_H, tl.arange(0, BLOCK_H)
    return program // tiles, program // tiles * (H // G) + first, row, first + row < H // G


@triton.jit
def softmax_step(score, listed, most, total):
    """One block of the running softmax: the new maximum and sum per head, the block's terms, what shrinks the old ones.

    `score` is in units of log 2; only its `listed` columns count.
    """
    score = tl.where(listed[None, :], score, float("-inf"))
    above = tl.maximum(most, tl.max(score, 1))
    pivot = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp2(score - pivot[:, None])
    shrink = tl.exp2(most - pivot)
    return above, total * shrink + tl.sum(p, 1), p, shrink


def split_dim(dim: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that together hold `dim` columns; products need 16 or more."""
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, max(16, triton.next_power_of_2(dim - first)) if dim > first else 0


class TileSizes(NamedTuple):
    """Compile-time sizes of head dims and tiles."""

    K0: int
    K1: int
    V0: int
    BLOCK_H: int
    BLOCK_N: int  # where it is not tuned

    @classmethod
    def of(cls, dtype: torch.dtype, key_dim: int, value_dim: int, heads_per_group: int) -> TileSizes:
        """Sizes for a dtype, head dims and the number of query heads per key head."""
        K0, K1 = split_dim(key_dim)
        V0 = max(16, triton.next_power_of_2(value_dim))
        heads = min(64, max(16, triton.next_power_of_2(heads_per_group)))
        wide = max(K0, V0) > 256
        if dtype == torch.float32:
            return cls(K0, K1, V0, 16, 16 if wide else 32)
        return cls(K0, K1, V0, heads, 64)

    def dims(self) -> dict[str, int]:
        """The sizes by the names of kernel arguments, for kernels whose blocks of listed places are tuned."""
        return {name: size for name, size in self._asdict().items() if name != "BLOCK_N"}

    def sizes(self, **widest: int) -> dict[str, int]:
        """The sizes by the names of kernel arguments; `widest` bounds tiles where head dims are above 256."""
        sizes = self._asdict()
        if max(self.K0, self.V0) > 256:
            sizes |= {name: min(size, sizes[name]) for name, size in widest.items()}
        return sizes
