"""Position-weighted means in blocks of queries, whose weights are computed again in the backward.

Keys before a block of queries have their largest so far in common, which is divided out: e^{k - m} and e^w are then
two factors, and sums over these keys are matrix products. The keys of the block itself are weighted one by one. No
token's result depends on a later one.

Legend: B rows, T queries, S keys, C channels, P positions, R rank, Q queries of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recompute import recomputed

BLOCK_QUERIES = 16


def position_weighted_mean(k_BSC: Tensor, v_BSC: Tensor, left_PR: Tensor, right_PR: Tensor, window: int | None,
                           queries: int, cu_seqlens: CuSeqlens | None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    left_wide, right_wide = wide(left_PR), wide(right_PR)

    def rows(k: Tensor, v: Tensor) -> Tensor:
        S = k.shape[1]
        first = 0 if cu_seqlens is not None else S - queries
        k_wide, v_wide = wide(k), wide(v)  # the blocks keep slices of these, and no copy of their own
        found = []
        for start in range(first, S, BLOCK_QUERIES):
            stop = min(start + BLOCK_QUERIES, S)
            found.append(recomputed(
                lambda k, v, left, right, start=start: _block(k, v, left, right, start, window),
                k_wide[:, :stop], v_wide[:, :stop], left_wide[start:stop], right_wide[:stop]))
        return torch.cat(found, 1).to(v.dtype)

    return rows(k_BSC, v_BSC) if cu_seqlens is None else each_document_row(rows, (k_BSC, v_BSC), cu_seqlens)


def _block(k_BSC: Tensor, v_BSC: Tensor, left_QR: Tensor, right_SR: Tensor, start: int, window: int | None) -> Tensor:
    """The means [B, Q, C] of the queries from `start` on, which are the last of the keys."""
    w_QS = left_QR @ right_SR.T
    place_S = torch.arange(k_BSC.shape[1], device=k_BSC.device)
    distance_QS = place_S[start:, None] - place_S
    if window is not None:
        w_QS = torch.where(distance_QS < window, w_QS, 0.0)
    own_QQ = w_QS[:, start:].masked_fill(distance_QS[:, start:] < 0, -torch.inf)
    own_BQQC = k_BSC[:, None, start:] + own_QQ[..., None]
    largest_BQC = own_BQQC.detach().amax(2)
    if start:
        w_QS = w_QS[:, :start]
        k_largest_B1C = k_BSC[:, :start].detach().amax(1, keepdim=True)
        w_largest_Q1 = w_QS.detach().amax(1, keepdim=True)
        before_BQC = k_largest_B1C + w_largest_Q1
        largest_BQC = torch.maximum(largest_BQC, before_BQC)
    weight_BQQC = (own_BQQC - largest_BQC[:, :, None]).exp()
    above_BQC = (weight_BQQC * v_BSC[:, None, start:]).sum(2)
    below_BQC = weight_BQQC.sum(2)
    if start:
        key_BSC = (k_BSC[:, :start] - k_largest_B1C).exp()
        sums_BQX = (w_QS - w_largest_Q1).exp() @ torch.cat([key_BSC * v_BSC[:, :start], key_BSC], -1)
        scale_BQC = (before_BQC - largest_BQC).exp()
        above, below = sums_BQX.chunk(2, -1)
        above_BQC, below_BQC = above_BQC + scale_BQC * above, below_BQC + scale_BQC * below
    return above_BQC / below_BQC
