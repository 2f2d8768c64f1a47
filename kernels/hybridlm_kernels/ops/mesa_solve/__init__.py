"""Mesa solve: queries times the inverse of the regularised, decayed second moment of the keys so far (MesaNet).

Legend: B rows, T tokens per row, H heads, K key dim, N documents.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.mesa_solve import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import (
    Borders,
    borders_of,
    check_per_token,
    check_shapes,
    empty_states,
    math_dtype,
    without_empty_documents,
)
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("mesa_solve", (
    Backend("torch", torch_backend.mesa_solve),
    Backend("reference", reference.mesa_solve),
)))


def _outputs(q_BTHK: Tensor, k_BTHK: Tensor, beta_BTH: Tensor, g_BTH: Tensor, lambda_HK: Tensor, *,
             cu_seqlens: CuSeqlens | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    return q_BTHK.new_empty(q_BTHK.shape), empty_states(k_BTHK, k_BTHK, cu_seqlens)


@compilable(_outputs)
def mesa_solve(q_BTHK: Tensor, k_BTHK: Tensor, beta_BTH: Tensor, g_BTH: Tensor, lambda_HK: Tensor, *,
               iterations: int = 30, initial_state: Tensor | None = None, cu_seqlens: Borders = None,
               backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Solve a linear system per token, whose matrix is the decayed second moment of the keys up to the token.

        S_t = e^{g_t} S_{t-1} + beta_t k_t k_t^T;   x_t = (S_t + Diag(lambda))^{-1} q_t

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        beta_BTH: weights of the keys, at least 0.
        g_BTH: natural logarithm of the decay, at most 0.
        lambda_HK: regularisation, above 0.
        iterations: steps of the conjugate gradient method, which is exact from K on, up to rounding; the reference
            solves exactly.
        initial_state: S before the first token of every document, [N, H, K, K], symmetric; None is zero.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        x [B, T, H, K] in q's dtype, and S after the last token of every document, [N, H, K, K] in float32 (float64 for
        float64 keys). Half precision inputs are computed in float32.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: von Oswald et al. 2025, MesaNet, sections 3 and 4.

    >>> import torch
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> x, state = mesa_solve(ones, ones, torch.ones(1, 3, 1), torch.zeros(1, 3, 1), torch.ones(1, 1))
    >>> x.flatten(), state.flatten()  # 1 / (S + 1) with S = 1, 2, 3
    (tensor([0.5000, 0.3333, 0.2500]), tensor([3.]))
    """
    B, T, H, K = k_BTHK.shape if k_BTHK.dim() == 4 else (0, 0, 0, 0)
    borders = borders_of(cu_seqlens, B, T, q_BTHK.device)
    check_shapes("mesa_solve", q_BTHK, k_BTHK, k_BTHK, initial_state, borders)
    for label, x, shape in (("beta", beta_BTH, (B, T, H)), ("g", g_BTH, (B, T, H)), ("lambda", lambda_HK, (H, K))):
        check_per_token("mesa_solve", label, x, {"one per head": shape})
    if iterations < 1:
        raise ValueError(f"mesa_solve: iterations must be positive; got {iterations}")
    call = Call.of(k_BTHK, q_BTHK, beta_BTH, g_BTH, lambda_HK, initial_state, key_dim=K, value_dim=K,
                   packed=borders is not None)
    with autocast(q_BTHK.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        wide = [x.to(math_dtype(k_BTHK)) for x in (q_BTHK, k_BTHK, beta_BTH, g_BTH, lambda_HK)]
        x_BTHK, state = without_empty_documents(lambda state, filled: run(*wide, state, filled, iterations),
                                                initial_state, borders)
    return x_BTHK.to(q_BTHK.dtype), state
