"""Position-weighted means with all weights [B, T, S, C] in memory: the definition (Zhai et al. 2021, eq. 2, causal).

Legend: B rows, T queries, S keys, C channels, P positions, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide


def position_weighted_mean(k_BSC: Tensor, v_BSC: Tensor, left_PR: Tensor, right_PR: Tensor, window: int | None,
                           queries: int, cu_seqlens: CuSeqlens | None) -> Tensor:
    """The reference backend; arguments as in the public function, already checked."""

    def rows(k: Tensor, v: Tensor) -> Tensor:
        S = k.shape[1]
        T = S if cu_seqlens is not None else queries
        place_S = torch.arange(S, device=k.device)
        distance_TS = place_S[S - T :, None] - place_S
        w_TS = wide(left_PR[S - T : S]) @ wide(right_PR[:S]).T
        w_TS = w_TS if window is None else torch.where(distance_TS < window, w_TS, 0.0)
        w_TS = w_TS.masked_fill(distance_TS < 0, -torch.inf)
        return torch.einsum("btsc,bsc->btc", (wide(k)[:, None] + w_TS[..., None]).softmax(2), wide(v)).to(v.dtype)

    return rows(k_BSC, v_BSC) if cu_seqlens is None else each_document_row(rows, (k_BSC, v_BSC), cu_seqlens)
