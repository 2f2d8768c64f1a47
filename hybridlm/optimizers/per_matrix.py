"""Wrapper that runs any torch optimizer on complete matrices under every engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm.optimizers.contract import Groups, MatrixOptimizer


class PerMatrixOptimizer(MatrixOptimizer):
    """Steps every matrix with an optimizer of the class `inner`, as if it were a parameter of its own.

    State of a stack [E, A, B] is that of its E matrices, stacked; a count (a tensor without dimensions) is common to
    them. The state of `inner` must consist of tensors.

    Args:
        inner: a torch optimizer class that updates 2-D parameters.
        groups: parameter groups as torch optimizers take them.
        lr: learning rate.
        options: further options of `inner`.
    """

    needs_weight = True

    def __init__(self, inner: type[torch.optim.Optimizer], groups: Groups, *, lr: float, **options: Any):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, **options})
        self.inner = inner
        self.option_names = ("lr", "weight_decay", *options)

    def matrix_step(self, matrix: Tensor, weight: Tensor | None, state: dict[str, Tensor],
                    group: dict[str, Any]) -> Tensor:
        """The weight after a step of `inner` with the gradient `matrix`."""
        assert weight is not None
        changed = weight.detach().clone()
        single = matrix.dim() == 2
        parameters = [changed] if single else list(changed.unbind(0))
        gradients = [matrix] if single else list(matrix.unbind(0))
        inner = self.inner([*parameters], **{name: group[name] for name in self.option_names})
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            parameter.grad = gradient
            if state:
                inner.state[parameter] = {key: value.clone() if single or value.dim() == 0 else value[index].clone()
                                          for key, value in state.items()}
        inner.step()
        states = [inner.state[parameter] for parameter in parameters]
        for key, value in states[0].items():
            common = single or value.dim() == 0
            state[key] = value if common else torch.stack([one[key] for one in states])
        return changed

    def apply(self, weight: Tensor, result: Tensor, group: dict[str, Any]) -> None:
        """Copy the new weight, which `matrix_step` has decayed already."""
        weight.copy_(result)
