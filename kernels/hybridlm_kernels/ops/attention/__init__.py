"""Causal softmax attention with grouped heads, window, sinks and packed documents. Costs: README.md."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybridlm_kernels.ops.attention import flash_attn_backend as flash_attn
from hybridlm_kernels.ops.attention import reference
from hybridlm_kernels.ops.attention import torch_backend as eager
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

ATTENTION = register(Operation("attention", (
    Backend("torch", eager.attention), Backend("flash_attn", flash_attn.attention, flash_attn.supports, ("cuda",)),
    Backend("reference", reference.attention))))


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *, scale: float | None = None,
              window: int | None = None, sinks_H: Tensor | None = None,
              cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None,
              backend: str | None = None) -> Tensor:
    """Causal softmax attention; the queries are the last T of S positions.

    Args:
        q_BTHK: [B, T, H, K].
        k_BSGK, v_BSGV: [B, S, G, K] and [B, S, G, V], S >= T; query head h reads head h // (H/G).
        scale: of the scores; K**-0.5 by default.
        window: number of visible keys, the query's own included; None sees all.
        sinks_H: [H], one more logit a head in every softmax, with no value (gpt-oss).
        cu_seqlens: borders of packed documents, counted over the flattened B*T tokens (T == S then).

    Returns:
        [B, T, H, V] in v.dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, queries, heads, dim = q_BTHK.shape
    if k_BSGK.dim() != 4 or k_BSGK.shape[:3] != v_BSGV.shape[:3] or k_BSGK.shape[0] != batch:
        raise ValueError(f"attention: k and v must be [{batch}, S, G, *] with equal S and G; "
                         f"got {list(k_BSGK.shape)} and {list(v_BSGV.shape)}")
    keys, groups = k_BSGK.shape[1:3]
    if k_BSGK.shape[3] != dim or heads % groups:
        raise ValueError(f"attention: q {list(q_BTHK.shape)} does not fit k {list(k_BSGK.shape)}: equal head "
                         "dims and a multiple of the key heads are needed")
    if keys < queries:
        raise ValueError(f"attention: {queries} queries need as many keys; got {keys}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1; got {window}")
    if sinks_H is not None and sinks_H.shape != (heads,):
        raise ValueError(f"attention: sinks must be [{heads}]; got {list(sinks_H.shape)}")
    if cu_seqlens is not None:
        if keys != queries:
            raise ValueError(f"attention: packed documents need T == S; got T = {queries}, S = {keys}")
        cu_seqlens = CuSeqlens.of(cu_seqlens, q_BTHK.device)
        cu_seqlens.check(batch, queries)
    call = Call.of(q_BTHK, k_BSGK, v_BSGV, sinks_H, key_dim=dim, value_dim=v_BSGV.shape[3], sinks=sinks_H is not None)
    chosen = choose(ATTENTION, call, backend)
    return chosen.run(q_BTHK, k_BSGK, v_BSGV, scale, window, sinks_H, cu_seqlens)
