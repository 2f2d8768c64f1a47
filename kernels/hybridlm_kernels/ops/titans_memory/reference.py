"""The memory of Titans token by token: the definition that other backends are compared with.

S_t = eta_t S_{t-1} - theta_t grad |f(k_t; W) - v_t|^2,   M_t = (1 - alpha_t) M_{t-1} + S_t,   o_t = f(q_t; M_t)
(Behrouz et al. 2025, Titans, eq. 9 to 15; W of section 3.2.) The gradient is that of autograd.

Legend: B rows, T tokens, H heads, K head dim, F hidden dim, N documents, P weights of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document


def read_memory(weights_P: Tensor, x_K: Tensor, hidden_dim: int) -> Tensor:
    """The output f(x) [K] of the memory of one head."""
    K = len(x_K)
    if hidden_dim == 0:
        return x_K @ weights_P.view(K, K)
    W1, W2 = weights_P.split(K * hidden_dim)
    return F.gelu(x_K @ W1.view(K, hidden_dim), approximate="tanh") @ W2.view(hidden_dim, K)


def titans_memory(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, alpha_BTH: Tensor, eta_BTH: Tensor,
                  theta_BTH: Tensor, state_N3HP: Tensor, borders: CuSeqlens | None, hidden_dim: int, chunk: int,
                  open_tokens: int) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked, all in one dtype."""

    def loss(weights: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (read_memory(weights, k, hidden_dim) - v).square().sum()

    read = vmap(vmap(lambda weights, x: read_memory(weights, x, hidden_dim)))
    gradient = vmap(vmap(grad(loss)))

    def steps(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor,
              state: Tensor) -> tuple[Tensor, Tensor]:
        start, memory, surprise = state.unbind(1)
        outputs = []
        for t in range(q.shape[1]):
            surprise = eta[:, t, :, None] * surprise - theta[:, t, :, None] * gradient(start, k[:, t], v[:, t])
            memory = (1 - alpha[:, t, :, None]) * memory + surprise
            outputs.append(read(memory, q[:, t]))
            if (open_tokens + t + 1) % chunk == 0:
                start = memory
        return torch.stack(outputs, 1), torch.stack([start, memory, surprise], 1)

    tokens = (q_BTHK, k_BTHK, v_BTHK, alpha_BTH, eta_BTH, theta_BTH)
    return each_document(steps, borders, tokens, state_N3HP)  # type: ignore[arg-type]
