"""Softmax attention whose positions are products of reflections (PaTH).

B rows, T tokens, P earlier keys, S = P + T, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.path_attention import reference, torch_backend
from hybridlm_kernels.ops.path_attention.torch_backend import move_keys as move_keys
from hybridlm_kernels.recurrence.arguments import Borders, filled_borders_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("path_attention", (
    Backend("torch", torch_backend.path_attention),
    Backend("reference", reference.path_attention))))


def _outputs(q_BTHK: Tensor, k_BTGK: Tensor, v_BSGV: Tensor, w_BTGK: Tensor, beta_BTG: Tensor, **_: Any) -> Tensor:
    return v_BSGV.new_empty((*q_BTHK.shape[:3], v_BSGV.shape[3]))


@compilable(_outputs, keeps=("q_BTHK", "k_BTGK", "v_BSGV", "w_BTGK", "beta_BTG"))
def path_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BSGV: Tensor, w_BTGK: Tensor, beta_BTG: Tensor, *,
                   g_BSH: Tensor | None = None, past_BPGK: Tensor | None = None, scale: float | None = None,
                   cu_seqlens: Borders = None, backend: str | None = None) -> Tensor:
    """Causal softmax attention in which every token reflects all keys before it.

        score_ts = scale q_t^T H_t H_{t-1} ... H_{s+1} k_s + g_{s+1} + ... + g_t,      H_i = I - beta_i w_i w_i^T

    Args:
        q_BTHK: queries [B, T, H, K], activated.
        k_BTGK: keys [B, T, G, K], activated. Query head h reads key head h // (H/G).
        v_BSGV: values [B, P + T, G, V], those of the earlier keys first.
        w_BTGK: directions of the reflections, of length one.
        beta_BTG: their strengths, between 0 and 2; 2 is a reflection, 1 a projection.
        g_BSH: logarithms of forget gates [B, P + T, H], finite; None forgets nothing.
        past_BPGK: keys of earlier tokens as the first of these tokens would read them without its own reflection
            (`move_keys` in this module); None: there are none.
        scale: factor on the scores, K**-0.5 by default; not on the gates.
        cu_seqlens: cumulative lengths of packed documents over the flattened B*T tokens, with the start of every row
            among them; without earlier keys then. No query sees another document.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, V] in v's dtype. Differentiable in all tensors.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Yang et al. 2025, PaTH Attention: Position Encoding via Accumulating Householder Transformations.

    >>> import torch
    >>> q = torch.full((1, 2, 1, 2), 20.0)  # the second token turns the first key around
    >>> k, v = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2), torch.tensor([0.0, 3.0]).view(1, 2, 1, 1)
    >>> path_attention(q, k, v, k, torch.full((1, 2, 1), 2.0)).flatten()
    tensor([0., 3.])
    """
    if q_BTHK.dim() != 4 or k_BTGK.dim() != 4 or v_BSGV.dim() != 4:
        raise ValueError("path_attention: q, k and v must be [B, T, H, K], [B, T, G, K] and [B, S, G, V]; got "
                         f"{list(q_BTHK.shape)}, {list(k_BTGK.shape)} and {list(v_BSGV.shape)}")
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    S = T + (0 if past_BPGK is None else past_BPGK.shape[1])
    wanted = {"k": (k_BTGK, (B, T, G, K)), "v": (v_BSGV, (B, S, G, v_BSGV.shape[3])), "w": (w_BTGK, (B, T, G, K)),
              "beta": (beta_BTG, (B, T, G)), "g": (g_BSH, (B, S, H)), "past": (past_BPGK, (B, S - T, G, K))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"path_attention: {name} must be {list(shape)}; got {list(tensor.shape)}")
    if H % G:
        raise ValueError(f"path_attention: the {H} query heads must be a multiple of the {G} key heads")
    borders = None
    if cu_seqlens is not None:
        if past_BPGK is not None:
            raise ValueError("path_attention: packed documents have no earlier keys")
        borders = filled_borders_of(cu_seqlens, B, T, q_BTHK.device)
    call = Call.of(q_BTHK, k_BTGK, v_BSGV, w_BTGK, beta_BTG, g_BSH, key_dim=K, value_dim=v_BSGV.shape[3])
    chosen = choose(OPERATION, call, backend)
    with autocast(q_BTHK.device.type, enabled=False):
        return chosen.run(q_BTHK, k_BTGK, v_BSGV, w_BTGK, beta_BTG, g_BSH, past_BPGK,
                          K**-0.5 if scale is None else scale, borders)
