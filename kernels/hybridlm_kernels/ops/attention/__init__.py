"""Causal softmax attention with grouped heads, window, sinks and packed documents. Costs: README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.attention import flash_attn_backend, reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import filled_borders_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

ATTENTION = register(Operation("attention", (
    Backend("torch", torch_backend.attention),
    Backend("flash_attn", flash_attn_backend.attention, flash_attn_backend.supports, ("cuda",)),
    Backend("reference", reference.attention))))


def _outputs(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, **_: Any) -> Tensor:
    return v_BSGV.new_empty((*q_BTHK.shape[:3], v_BSGV.shape[3]))


@compilable(_outputs, keeps=("q_BTHK", "k_BSGK", "v_BSGV"), keeps_outputs=(0,))
def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *, scale: float | None = None,
              window: int | None = None, sinks_H: Tensor | None = None,
              cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None,
              backend: str | None = None) -> Tensor:
    """Causal softmax attention: each query, of the last T of S positions, reads the keys up to its own position.

    Args:
        q_BTHK: queries [B, T, H, K], activated: rotated and normalized where the model does so.
        k_BSGK: keys [B, S, G, K], activated like the queries, S >= T. Query head h reads key head h // (H/G).
        v_BSGV: values [B, S, G, V], activated.
        scale: factor on the scores, K**-0.5 by default.
        window: number of visible keys, the query's own included; None sees all.
        sinks_H: raw logits [H]: one more logit per head in every softmax, with no value (gpt-oss).
        cu_seqlens: cumulative lengths of packed documents over the flattened B*T tokens, with the start of every row
            among them; T == S then. No query sees another document.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, V] in v's dtype. Differentiable in q, k, v and the sinks.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Sources: Vaswani et al. 2017, Attention Is All You Need, section 3.2; gpt-oss model card, 2025 (sinks).

    >>> import torch
    >>> q = k = torch.zeros(1, 3, 1, 2)  # equal scores: the mean over the visible values
    >>> attention(q, k, torch.tensor([0.0, 2.0, 4.0]).view(1, 3, 1, 1)).flatten()
    tensor([0., 1., 2.])
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
        cu_seqlens = filled_borders_of(cu_seqlens, batch, queries, q_BTHK.device)
    call = Call.of(q_BTHK, k_BSGK, v_BSGV, sinks_H, key_dim=dim, value_dim=v_BSGV.shape[3], sinks=sinks_H is not None)
    chosen = choose(ATTENTION, call, backend)
    return chosen.run(q_BTHK, k_BSGK, v_BSGV, scale, window, sinks_H, cu_seqlens)
