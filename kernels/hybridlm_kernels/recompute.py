"""Parts of an operation that keep their inputs alone and are computed again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward


def recomputed(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply `run`, and keep nothing but its inputs for the backward, which applies it again.

    Args:
        run: a function of these tensors that returns one tensor; it reads no other tensor that needs a gradient, and
            computes the same twice.
        tensors: its inputs.

    Returns:
        The result of `run`. There is no gradient of its gradient.

    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> torch.autograd.grad(recomputed(lambda x: x.exp().log() ** 3, x), x)[0]
    tensor([12.])
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return run(*tensors)
    return _Recomputed.apply(run, *tensors)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            result = ctx.run(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, upstream, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)
