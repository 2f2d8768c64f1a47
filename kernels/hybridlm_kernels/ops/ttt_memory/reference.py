"""Test-time training token by token: the definition that other backends are compared with.

W_j = W - scale_j sum_{s<=j} rate_s grad loss_s(W);  o_j = q_j + LN(f(q_j; W_j))
loss_s(W) = 1/2 |LN(f(k_s; W)) - (v_s - k_s)|^2
(Sun et al. 2024, Learning to (Learn at Test Time), eq. 4 and section 2.6.) The gradient is that of autograd.

Legend: B rows, T tokens, H heads, K head dim, F hidden dim, M tokens of a mini-batch, N documents, P weights of a head.
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
        W, b = weights_P.split([K * K, K])
        return x_K @ W.view(K, K) + b
    W1, b1, W2, b2 = weights_P.split([K * hidden_dim, hidden_dim, hidden_dim * K, K])
    hidden = F.gelu(x_K @ W1.view(K, hidden_dim) + b1, approximate="tanh")
    return hidden @ W2.view(hidden_dim, K) + b2


def ttt_memory(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, rate_BTH: Tensor, scale_M: Tensor,
                       norm_weight_HK: Tensor, norm_bias_HK: Tensor, state_N2HP: Tensor, borders: CuSeqlens | None,
                       hidden_dim: int, eps: float, open_tokens: int) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked, all in one dtype."""

    def read(weights: Tensor, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.layer_norm(read_memory(weights, x, hidden_dim), x.shape, gamma, beta, eps)

    def loss(weights: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return 0.5 * (read(weights, k, gamma, beta) - (v - k)).square().sum()

    read_all = vmap(vmap(read), in_dims=(0, 0, None, None))
    gradient = vmap(vmap(grad(loss)), in_dims=(0, 0, 0, None, None))

    def steps(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        start_BHP = state[:, 0]
        sum_BHP = state[:, 1] if open_tokens else torch.zeros_like(start_BHP)
        outputs = []
        for t in range(q.shape[1]):
            place = (open_tokens + t) % len(scale_M)
            grads_BHP = gradient(start_BHP, k[:, t], v[:, t], norm_weight_HK, norm_bias_HK)
            sum_BHP = sum_BHP + rate[:, t, :, None] * grads_BHP
            now_BHP = start_BHP - scale_M[place] * sum_BHP
            outputs.append(q[:, t] + read_all(now_BHP, q[:, t], norm_weight_HK, norm_bias_HK))
            if place == len(scale_M) - 1:
                start_BHP, sum_BHP = now_BHP, torch.zeros_like(sum_BHP)
        return torch.stack(outputs, 1), torch.stack([start_BHP, sum_BHP], 1)

    return each_document(steps, borders, (q_BTHK, k_BTHK, v_BTHK, rate_BTH), state_N2HP)  # type: ignore[arg-type]
