"""Softmax attention to all entries that a query sees, piece by piece of queries.

B rows, T queries, Q queries of a piece, H query heads, G key/value heads, R = H/G, E entries, K/V key/value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.overlap import window_softmax
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recompute import recomputed

PIECE_ELEMENTS = 2**20  # scores of a piece


def entry_attention(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, windows: EntryWindows,
                    scale: float) -> Tensor:
    """Attend to the entries of the complete windows of each query's document; zeros where there are none.

    A piece keeps its inputs alone, and is computed again in the backward: nothing of size T * E is kept.

    Args:
        q_BTHK: queries.
        k_BEGK: keys of the entries.
        v_BEGV: values of the entries.
        windows: the windows that entries stand for.
        scale: factor of the scores.

    Returns:
        Outputs [B, T, H, V] in the dtype of the values.
    """
    batch, queries, heads = q_BTHK.shape[:3]
    groups = k_BEGK.shape[2]
    size = max(8, PIECE_ELEMENTS // max(1, batch * heads * k_BEGK.shape[1]))
    found = []
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))

        def attend(q_BQHK: Tensor, k: Tensor, v: Tensor, rows: slice = rows) -> Tensor:
            with torch.autocast(q_BQHK.device.type, enabled=False):
                q_BQGRK = wide(q_BQHK).unflatten(2, (groups, -1)) * scale
                p = window_softmax(torch.einsum("bqgrk,begk->bqgre", q_BQGRK, wide(k)), windows, rows)
                return torch.einsum("bqgre,begv->bqgrv", p, wide(v)).flatten(2, 3).to(v.dtype)

        inputs = q_BTHK[:, rows], k_BEGK, v_BEGV
        found.append(attend(*inputs) if torch.compiler.is_dynamo_compiling() else recomputed(attend, *inputs))
    return torch.cat(found, 1)
