"""Values of DeltaFormer: each with what attention to the earlier ones returns subtracted from it.

B rows, T tokens, P earlier tokens, S = P + T, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.deltaformer_values import reference, torch_backend
from hybridlm_kernels.recurrence.arguments import Borders, filled_borders_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("deltaformer_values", (
    Backend("torch", torch_backend.deltaformer_values),
    Backend("reference", reference.deltaformer_values))))


def _outputs(q_BTHK: Tensor, k_BSGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, **_: Any) -> Tensor:
    return v_BTGV.new_empty((*q_BTHK.shape[:3], v_BTGV.shape[3]))


@compilable(_outputs, keeps=("q_BTHK", "k_BSGK", "v_BTGV", "beta_BTH"))
def deltaformer_values(q_BTHK: Tensor, k_BSGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, *,
                       past_BPHV: Tensor | None = None, scale: float | None = None, cu_seqlens: Borders = None,
                       backend: str | None = None) -> Tensor:
    """Values that DeltaFormer attends to: what attention to the earlier ones reads is erased from each.

        u_t = v_t - beta_t sum_{s < t} p_ts u_s,    p_t = softmax over s < t of scale q_t . k_s

    Args:
        q_BTHK: queries [B, T, H, K], activated.
        k_BSGK: keys [B, P + T, G, K], activated, those of earlier tokens first. Query head h reads key head h // (H/G).
        v_BTGV: values [B, T, G, V].
        beta_BTH: strengths [B, T, H], any numbers.
        past_BPHV: results of this operation for the earlier tokens; None: there are none.
        scale: factor on the scores, K**-0.5 by default.
        cu_seqlens: cumulative lengths of packed documents over the flattened B*T tokens, with the start of every row
            among them; without earlier tokens then. No token sees another document.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        u [B, T, H, V] in v's dtype, one per query head. Differentiable in all tensors.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Zhong et al. 2025, Understanding Transformer from the Perspective of Associative Memory (DeltaFormer).

    >>> import torch
    >>> q = k = torch.zeros(1, 3, 1, 2)  # equal scores: half the mean of the earlier ones is subtracted
    >>> deltaformer_values(q, k, torch.ones(1, 3, 1, 1), torch.full((1, 3, 1), 0.5)).flatten()
    tensor([1.0000, 0.5000, 0.6250])
    """
    if q_BTHK.dim() != 4 or k_BSGK.dim() != 4 or v_BTGV.dim() != 4:
        raise ValueError("deltaformer_values: q, k and v must be [B, T, H, K], [B, S, G, K] and [B, T, G, V]; got "
                         f"{list(q_BTHK.shape)}, {list(k_BSGK.shape)} and {list(v_BTGV.shape)}")
    B, T, H, K = q_BTHK.shape
    G, V = v_BTGV.shape[2:]
    P = 0 if past_BPHV is None else past_BPHV.shape[1]
    wanted = {"k": (k_BSGK, (B, P + T, G, K)), "v": (v_BTGV, (B, T, G, V)), "beta": (beta_BTH, (B, T, H)),
              "past": (past_BPHV, (B, P, H, V))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"deltaformer_values: {name} must be {list(shape)}; got {list(tensor.shape)}")
    if H % G:
        raise ValueError(f"deltaformer_values: the {H} query heads must be a multiple of the {G} key heads")
    borders = None
    if cu_seqlens is not None:
        if past_BPHV is not None:
            raise ValueError("deltaformer_values: packed documents have no earlier tokens")
        borders = filled_borders_of(cu_seqlens, B, T, q_BTHK.device)
    chosen = choose(OPERATION, Call.of(q_BTHK, k_BSGK, v_BTGV, beta_BTH, past_BPHV, key_dim=K, value_dim=V), backend)
    with autocast(q_BTHK.device.type, enabled=False):
        return chosen.run(q_BTHK, k_BSGK, v_BTGV, beta_BTH, past_BPHV, K**-0.5 if scale is None else scale, borders)
