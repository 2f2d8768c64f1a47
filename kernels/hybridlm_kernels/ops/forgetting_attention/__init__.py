"""Softmax attention with a forget gate per query head and token (Forgetting Transformer).

B rows, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.attention_arguments import check_attention
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.forgetting_attention import reference, torch_backend
from hybridlm_kernels.recurrence.arguments import Borders
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend

MAX_HEAD_DIM = 256  # that a tile of the Triton kernels holds


def _fits_triton(call: Call) -> tuple[bool, str]:
    widest = max(call.get("key_dim"), call.get("value_dim"))
    return (True, "") if widest <= MAX_HEAD_DIM else (False, f"holds heads of up to {MAX_HEAD_DIM} dims; got {widest}")


OPERATION = register(Operation("forgetting_attention", (
    lazy_triton_backend(f"{__name__}.triton_backend", "forgetting_attention", _fits_triton),
    Backend("torch", torch_backend.forgetting_attention),
    Backend("reference", reference.forgetting_attention))))


def _outputs(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, g_BSH: Tensor, **_: Any) -> Tensor:
    return v_BSGV.new_empty((*q_BTHK.shape[:3], v_BSGV.shape[3]))


@compilable(_outputs, keeps=("q_BTHK", "k_BSGK", "v_BSGV", "g_BSH"), keeps_outputs=(0,))
def forgetting_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, g_BSH: Tensor, *, scale: float | None = None,
                         window: int | None = None, cu_seqlens: Borders = None, backend: str | None = None) -> Tensor:
    """Causal softmax attention whose scores fall with all that was forgotten between key and query.

        score_ts = scale q_t . k_s + g_{s+1} + ... + g_t

    Args:
        q_BTHK: queries [B, T, H, K], activated: normalized or rotated where the model does so. They are the last T of
            the S positions.
        k_BSGK: keys [B, S, G, K], activated like the queries. Query head h reads key head h // (H/G).
        v_BSGV: values [B, S, G, V].
        g_BSH: logarithms of the forget gates [B, S, H], at most 0: one per query head, of the positions of the keys.
            -inf hides all earlier keys.
        scale: factor on the products of queries and keys, K**-0.5 by default.
        window: number of visible keys, the query's own included; None sees all.
        cu_seqlens: cumulative lengths of packed documents over the flattened B*T tokens, with the start of every row
            among them; T == S then. No query sees another document.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, V] in v's dtype. Differentiable in q, k, v and g.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Lin et al. 2025, Forgetting Transformer, section 3.

    >>> import torch
    >>> q = k = torch.zeros(1, 2, 1, 2)
    >>> g = torch.tensor([0.0, 0.5]).log().view(1, 2, 1)  # the second token halves the weight of the first
    >>> forgetting_attention(q, k, torch.tensor([0.0, 3.0]).view(1, 2, 1, 1), g).flatten().round(decimals=4)
    tensor([0., 2.])
    """
    borders = check_attention("forgetting_attention", q_BTHK, k_BSGK, v_BSGV, window, cu_seqlens)
    (batch, _, heads, dim), keys = q_BTHK.shape, k_BSGK.shape[1]
    if g_BSH.shape != (batch, keys, heads):
        raise ValueError(f"forgetting_attention: g must be [rows, keys, query heads] = {[batch, keys, heads]}; got "
                         f"{list(g_BSH.shape)}")
    call = Call.of(q_BTHK, k_BSGK, v_BSGV, g_BSH, key_dim=dim, value_dim=v_BSGV.shape[3], window=window is not None)
    chosen = choose(OPERATION, call, backend)
    with autocast(q_BTHK.device.type, enabled=False):
        return chosen.run(q_BTHK, k_BSGK, v_BSGV, g_BSH, dim**-0.5 if scale is None else scale, window, borders)
