"""2-simplicial attention: a query scores pairs of keys.

B rows, T queries, S first keys, R second keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.attention_arguments import check_attention
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.simplicial_attention import reference, torch_backend
from hybridlm_kernels.recurrence.arguments import Borders
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("simplicial_attention", (
    Backend("torch", torch_backend.simplicial_attention),
    Backend("reference", reference.simplicial_attention))))


def _outputs(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, k2_BRGK: Tensor, v2_BRGV: Tensor, **_: Any) -> Tensor:
    return v_BSGV.new_empty((*q_BTHK.shape[:3], v_BSGV.shape[3]))


@compilable(_outputs, keeps=("q_BTHK", "k_BSGK", "v_BSGV", "k2_BRGK", "v2_BRGV"))
def simplicial_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, k2_BRGK: Tensor, v2_BRGV: Tensor, *,
                         window: int = 512, second_window: int = 32, scale: float | None = None,
                         cu_seqlens: Borders = None, backend: str | None = None) -> Tensor:
    """Causal attention to pairs of tokens: one of the last `window`, and one of the last `second_window`.

        o_t = sum_{s,r} p_tsr v_s * v'_r,    p_t = softmax over all pairs of scale sum_c q_tc k_sc k'_rc

    Args:
        q_BTHK: queries [B, T, H, K], the last T of the S and of the R positions.
        k_BSGK: first keys [B, S, G, K]. Query head h reads key head h // (H/G).
        v_BSGV: first values [B, S, G, V].
        k2_BRGK: second keys [B, R, G, K].
        v2_BRGV: second values [B, R, G, V].
        window: first keys that a query sees, its own included.
        second_window: second keys that a query sees, its own included.
        scale: factor on the scores, K**-0.5 by default.
        cu_seqlens: cumulative lengths of packed documents over the flattened B*T tokens, with the start of every row
            among them; T == S == R then. No query sees another document.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, V] in v's dtype. Differentiable in all tensors.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Roy et al. 2025, Fast and Simplex: 2-Simplicial Attention in Triton, section 4.

    >>> import torch
    >>> q = k = torch.zeros(1, 2, 1, 2)  # equal scores: the product of both means
    >>> v = torch.tensor([0.0, 4.0]).view(1, 2, 1, 1)
    >>> simplicial_attention(q, k, v, k, v).flatten()
    tensor([0., 4.])
    """
    borders = check_attention("simplicial_attention", q_BTHK, k_BSGK, v_BSGV, window, cu_seqlens)
    check_attention("simplicial_attention (second keys)", q_BTHK, k2_BRGK, v2_BRGV, second_window, cu_seqlens)
    if k2_BRGK.shape[2] != k_BSGK.shape[2] or v2_BRGV.shape[3] != v_BSGV.shape[3]:
        raise ValueError("simplicial_attention: first and second keys need as many heads, values equal dims; got "
                         f"{list(v_BSGV.shape)} and {list(v2_BRGV.shape)}")
    dim = q_BTHK.shape[3]
    call = Call.of(q_BTHK, k_BSGK, v_BSGV, k2_BRGK, v2_BRGV, key_dim=dim, value_dim=v_BSGV.shape[3])
    chosen = choose(OPERATION, call, backend)
    with autocast(q_BTHK.device.type, enabled=False):
        return chosen.run(q_BTHK, k_BSGK, v_BSGV, k2_BRGK, v2_BRGV, dim**-0.5 if scale is None else scale, window,
                          second_window, borders)
