"""The solve of a chunk: X = L (I + B L)^-1, which answers Y = R - L B Y by Y = R - X B R.

X = (I + L B)^-1 L, so a column of X depends on no other column: X_ij = L_ij - sum_m L_im beta_m X_mj over j < m < i.
Inside diagonal blocks of 16 tokens one thread finds one column, in its registers and without a word to other threads.
The blocks pass through memory (the cache) into that layout and back, and matrix products join them.

X is kept rather than the inverse (I + B L)^-1, so that rounding touches its product alone and not the identity, and
beta = 0 needs no special case.

Legend: C = 64 tokens per chunk, i, j, m tokens of a chunk, B = diag(beta).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridlm_kernels.recurrence.triton_tiles import LEVELS, C, pairs_of

BLOCK = tl.constexpr(16)  # tokens per diagonal block, and columns of `blocks`
BLOCK_LEVEL = tl.constexpr(4)  # pairs of levels from here on lie in different blocks


@triton.jit
def solve(L, beta_ptr, blocks_ptr, stride, filled, PRECISION: tl.constexpr):
    """Find X [C, C] from L [C, C], of which what is below the diagonal counts.

    `blocks` is memory of the program for the diagonal blocks, [C, 16] in fp32, its rows `stride` apart.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    at_blocks = i * stride + j % BLOCK
    in_block = (i // BLOCK == j // BLOCK) & (i < filled)
    tl.store(blocks_ptr + at_blocks, tl.where(i > j, L, 0.0), mask=in_block)
    tl.debug_barrier()
    columns = tl.arange(0, C)
    first = columns // BLOCK * BLOCK  # token of the column's block
    rows = (tl.zeros([C], tl.float32),)
    written = (tl.zeros([C], tl.float32),)
    for n in tl.static_range(1, BLOCK):
        inside = first + n < filled
        from_row = blocks_ptr + (first + n) * stride
        x = tl.load(from_row + columns % BLOCK, mask=inside, other=0.0)
        for m in tl.static_range(1, n):
            x -= tl.load(from_row + m, mask=inside, other=0.0) * written[m]
        rows = rows + (x,)  # type: ignore[assignment]  # noqa: RUF005  triton cannot unpack
        beta = tl.load(beta_ptr + first + n, mask=inside, other=0.0)
        written = written + (x * beta,)  # type: ignore[assignment]  # noqa: RUF005
    tl.debug_barrier()
    for n in tl.static_range(1, BLOCK):
        tl.store(blocks_ptr + (first + n) * stride + columns % BLOCK, rows[n], mask=first + n < filled)
    tl.debug_barrier()
    X = tl.load(blocks_ptr + at_blocks, mask=in_block, other=0.0)
    beta = tl.load(beta_ptr + columns, mask=columns < filled, other=0.0)
    for e in tl.static_range(BLOCK_LEVEL, LEVELS):
        corner = tl.where(pairs_of(i, j, 1 << e), L, 0.0)
        corner -= tl.dot(corner * beta[None, :], X, input_precision=PRECISION)
        X += corner - tl.dot(X * beta[None, :], corner, input_precision=PRECISION)
    return X
