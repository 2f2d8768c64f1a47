"""Softmax attention that also returns the sum of its exponentials, so that another part can share the denominator.

B rows, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, autocast

from hybridlm_kernels.attention_arguments import check_attention
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.attention_total import reference, torch_backend
from hybridlm_kernels.recurrence.arguments import Borders
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("attention_total", (
    Backend("torch", torch_backend.attention_total),
    Backend("reference", reference.attention_total))))


def _outputs(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    return (v_BSGV.new_empty((*q_BTHK.shape[:3], v_BSGV.shape[3])),
            q_BTHK.new_empty(q_BTHK.shape[:3], dtype=dtype))


@compilable(_outputs, keeps=("q_BTHK", "k_BSGK", "v_BSGV"))
def attention_total(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *, scale: float | None = None,
                    window: int | None = None, cu_seqlens: Borders = None,
                    backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Causal softmax attention, and the sum of its exponentials relative to the largest score.

        n_t = sum_s exp(score_ts - m_t),    m_t = max over visible s of score_ts,    score_ts = scale q_t . k_s

    A part with the sum of weights w_t and of weighted values u_t shares the denominator: (n_t o_t + u_t) / (n_t + w_t).

    Args:
        q_BTHK: queries [B, T, H, K], activated: the last T of the S positions.
        k_BSGK: keys [B, S, G, K], activated. Query head h reads key head h // (H/G).
        v_BSGV: values [B, S, G, V].
        scale: factor on the scores, K**-0.5 by default.
        window: number of visible keys, the query's own included; None sees all.
        cu_seqlens: cumulative lengths of packed documents over the flattened B*T tokens, with the start of every row
            among them; T == S then. No query sees another document.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, V] in v's dtype, and n [B, T, H] in float32 (float64 for float64 queries). Differentiable in q, k
        and v; the gradient of n reaches the largest score too.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Zhang et al. 2024, LoLCATs, eq. 6.

    >>> q = k = torch.zeros(1, 3, 1, 2)  # equal scores
    >>> o, n = attention_total(q, k, torch.tensor([0.0, 2.0, 4.0]).view(1, 3, 1, 1))
    >>> o.flatten().tolist(), n.flatten().tolist()
    ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    """
    borders = check_attention("attention_total", q_BTHK, k_BSGK, v_BSGV, window, cu_seqlens)
    dim = q_BTHK.shape[3]
    call = Call.of(q_BTHK, k_BSGK, v_BSGV, key_dim=dim, value_dim=v_BSGV.shape[3], window=window is not None)
    chosen = choose(OPERATION, call, backend)
    with autocast(q_BTHK.device.type, enabled=False):
        return chosen.run(q_BTHK, k_BSGK, v_BSGV, dim**-0.5 if scale is None else scale, window, borders)
