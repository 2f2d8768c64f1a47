"""Means of past values, weighted by exponentials of keys and of numbers for pairs of positions (AFT-full, AFT-local).

Legend: B rows, T queries, S keys, C channels, P positions, R rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.position_weighted_mean import reference, torch_backend
from hybridlm_kernels.recurrence.arguments import Borders, filled_borders_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("position_weighted_mean", (
    Backend("torch", torch_backend.position_weighted_mean),
    Backend("reference", reference.position_weighted_mean))))


def _outputs(k_BSC: Tensor, v_BSC: Tensor, left_PR: Tensor, right_PR: Tensor, *, queries: int | None = None,
             **_: Any) -> Tensor:
    return v_BSC.new_empty((v_BSC.shape[0], v_BSC.shape[1] if queries is None else queries, v_BSC.shape[2]))


@compilable(_outputs, keeps=("k_BSC", "v_BSC", "left_PR", "right_PR"))
def position_weighted_mean(k_BSC: Tensor, v_BSC: Tensor, left_PR: Tensor, right_PR: Tensor, *,
                           window: int | None = None, queries: int | None = None, cu_seqlens: Borders = None,
                           backend: str | None = None) -> Tensor:
    """Average the values so far, in every channel by weights of its own.

        y_t = sum_{s<=t} e^{k_s + w_ts} v_s / sum_{s<=t} e^{k_s + w_ts},    w_ts = left_t . right_s

    Args:
        k_BSC: keys.
        v_BSC: values.
        left_PR: rows of w for the position of the query in its document, as factors of rank R.
        right_PR: columns of w for the position of the key.
        window: w is 0 for keys this many tokens before the query and more (AFT-local); None: for no key (AFT-full).
        queries: the number T of last positions for which y is wanted; None: all.
        cu_seqlens: cumulative lengths of packed documents over the flattened B S tokens, with the start of every row
            among them; T == S then. No token sees another document.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [B, T, C] in the dtype of v. Differentiable in all tensors.

    Raises:
        ValueError: the shapes do not fit one another, a document is longer than P, or borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Zhai et al. 2021, An attention free transformer, section 3, causal form.

    >>> import torch
    >>> k, v = torch.zeros(1, 2, 1), torch.tensor([0.0, 4.0]).view(1, 2, 1)
    >>> zeros = torch.zeros(2, 1)  # all weights are equal
    >>> position_weighted_mean(k, v, zeros, zeros).flatten()
    tensor([0., 2.])
    """
    if k_BSC.dim() != 3 or 0 in k_BSC.shape or v_BSC.shape != k_BSC.shape:
        raise ValueError("position_weighted_mean: k and v must be [batch, time, channels], none of them 0; got "
                         f"{list(k_BSC.shape)} and {list(v_BSC.shape)}")
    if left_PR.dim() != 2 or right_PR.shape != left_PR.shape:
        raise ValueError("position_weighted_mean: left and right must be [positions, rank]; got "
                         f"{list(left_PR.shape)} and {list(right_PR.shape)}")
    B, S, _ = k_BSC.shape
    T = S if queries is None else queries
    borders = None if cu_seqlens is None else filled_borders_of(cu_seqlens, B, S, k_BSC.device)
    longest = S if borders is None else max(borders.lengths)
    if longest > left_PR.shape[0]:
        raise ValueError(f"position_weighted_mean: has weights for {left_PR.shape[0]} positions; got a document of "
                         f"{longest} tokens")
    if not 0 < T <= S or (borders is not None and T != S):
        raise ValueError(f"position_weighted_mean: queries must be 1 to {S}, and all where rows are packed; got {T}")
    if window is not None and window < 1:
        raise ValueError(f"position_weighted_mean: window must be at least 1; got {window}")
    call = Call.of(k_BSC, v_BSC, left_PR, right_PR, packed=borders is not None)
    with autocast(k_BSC.device.type, enabled=False):
        return choose(OPERATION, call, backend).run(k_BSC, v_BSC, left_PR, right_PR, window, T, borders)
