"""Checks of arguments that operations of softmax attention share.

B rows, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import Borders, filled_borders_of


def check_attention(name: str, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int | None,
                    cu_seqlens: Borders) -> CuSeqlens | None:
    """Check queries, keys, values, window and borders of causal attention, the queries being the last T positions.

    Returns:
        The borders of the documents that have tokens; None without borders.

    Raises:
        ValueError: they do not fit one another; `name` is that of the operation.
    """
    if q_BTHK.dim() != 4 or k_BSGK.dim() != 4 or v_BSGV.dim() != 4 or k_BSGK.shape[:3] != v_BSGV.shape[:3]:
        raise ValueError(f"{name}: q, k and v must be [B, T, H, K], [B, S, G, K] and [B, S, G, V]; got "
                         f"{list(q_BTHK.shape)}, {list(k_BSGK.shape)} and {list(v_BSGV.shape)}")
    batch, queries, heads, dim = q_BTHK.shape
    keys, groups = k_BSGK.shape[1:3]
    if k_BSGK.shape[0] != batch or k_BSGK.shape[3] != dim or heads % groups or keys < queries:
        raise ValueError(f"{name}: q {list(q_BTHK.shape)} does not fit k {list(k_BSGK.shape)}: equal rows and head "
                         "dims, a multiple of the key heads and no more queries than keys are needed")
    if window is not None and window < 1:
        raise ValueError(f"{name}: window must be at least 1; got {window}")
    if cu_seqlens is None:
        return None
    if keys != queries:
        raise ValueError(f"{name}: packed documents need T == S; got T = {queries}, S = {keys}")
    return filled_borders_of(cu_seqlens, batch, queries, q_BTHK.device)
