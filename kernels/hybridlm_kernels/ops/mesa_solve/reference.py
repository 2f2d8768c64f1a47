"""Mesa solve token by token, by a direct solver: the definition that other backends are compared with.

S_t = e^{g_t} S_{t-1} + beta_t k_t k_t^T;   x_t = (S_t + Diag(lambda))^{-1} q_t
(von Oswald et al. 2025, MesaNet, section 3.)

Legend: B rows, T tokens, H heads, K key dim, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document


def mesa_solve(q_BTHK: Tensor, k_BTHK: Tensor, beta_BTH: Tensor, g_BTH: Tensor, lambda_HK: Tensor,
               state_NHKK: Tensor | None, borders: CuSeqlens | None, iterations: int) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked, all in one dtype."""

    def steps(q: Tensor, k: Tensor, beta: Tensor, g: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
        B, T, H, K = k.shape
        S = k.new_zeros(B, H, K, K) if S is None else S.to(k.dtype)
        x = []
        for t in range(T):
            S = g[:, t, :, None, None].exp() * S
            S = S + beta[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None, :]
            x.append(torch.linalg.solve(S + torch.diag_embed(lambda_HK), q[:, t]))
        return torch.stack(x, 1), S

    return each_document(steps, borders, (q_BTHK, k_BTHK, beta_BTH, g_BTH), state_NHKK)
