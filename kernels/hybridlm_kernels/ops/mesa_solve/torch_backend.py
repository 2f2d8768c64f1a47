"""Mesa solve by conjugate gradients, all tokens side by side.

A product of all the matrices S_t with one vector p_t each is linear attention with the queries p, the keys k and the
values beta k: no matrix of a single token is formed. The gradient is that of the solution, not of the steps towards
it: with y_t = (S_t + Diag(lambda))^{-1} dx_t it is y for q, and for all else that of -y_t^T (S_t + Diag(lambda)) x_t at
fixed x.
(von Oswald et al. 2025, MesaNet, section 4.)

Legend: B rows, T tokens, H heads, K key dim, N documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.ops.linear_attention import linear_attention
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward


def mesa_solve(q_BTHK: Tensor, k_BTHK: Tensor, beta_BTH: Tensor, g_BTH: Tensor, lambda_HK: Tensor,
               state_NHKK: Tensor | None, borders: CuSeqlens | None, iterations: int) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked, all in one dtype."""
    return _TorchMesaSolve.apply(q_BTHK, k_BTHK, beta_BTH, g_BTH, lambda_HK, state_NHKK, borders, iterations)


class _TorchMesaSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, beta: Tensor, g: Tensor, lambda_HK: Tensor, state: Tensor | None,
                borders: CuSeqlens | None, iterations: int) -> tuple[Tensor, Tensor]:
        x = conjugate_gradients(lambda p: _product(p, k, beta, g, lambda_HK, state, borders)[0], q, iterations)
        ctx.save_for_backward(x, k, beta, g, lambda_HK, state)
        ctx.borders, ctx.iterations = borders, iterations
        return x, _product(x, k, beta, g, lambda_HK, state, borders)[1]

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dx: Tensor, d_final: Tensor) -> Any:
        x, *saved = ctx.saved_tensors
        k, beta, g, lambda_HK = learnt = [t.detach().requires_grad_() for t in saved[:4]]
        state = None if saved[4] is None else saved[4].detach().requires_grad_()
        with torch.no_grad():
            y = conjugate_gradients(lambda p: _product(p, k, beta, g, lambda_HK, state, ctx.borders)[0], dx,
                                    ctx.iterations)
        with torch.enable_grad():
            product, final = _product(x, k, beta, g, lambda_HK, state, ctx.borders)
            leaves = learnt if state is None else [*learnt, state]
            grads = list(torch.autograd.grad([product, final], leaves, [-y, d_final]))
        return y, *grads, *[None] * (state is None), None, None


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solve A x = b over the last dim, for positive definite A that are known by their products.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> x = conjugate_gradients(lambda p: p @ A, torch.tensor([3.0, 4.0]), iterations=2)
    >>> [round(number, 4) for number in x.tolist()]
    [1.0, 1.0]
    """
    x, r, p = torch.zeros_like(b), b, b
    squared = (r * r).sum(-1, keepdim=True)
    for _ in range(iterations):
        Ap = product(p)
        curvature = (p * Ap).sum(-1, keepdim=True)
        # A system that is solved has nothing left to divide by.
        length = torch.where(curvature > 0, squared / curvature, 0.0)
        x, r = x + length * p, r - length * Ap
        before, squared = squared, (r * r).sum(-1, keepdim=True)
        p = r + torch.where(before > 0, squared / before, 0.0) * p
    return x


def _product(p: Tensor, k: Tensor, beta: Tensor, g: Tensor, lambda_HK: Tensor, state: Tensor | None,
             borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """(S_t + Diag(lambda)) p_t of every token, and S after the last token of every document."""
    o, final = linear_attention(p, k, beta[..., None] * k, g=g, scale=1.0, initial_state=state, cu_seqlens=borders)
    return o + lambda_HK * p, final
