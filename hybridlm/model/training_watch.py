"""Warnings of mistakes in training loops that a model notices: casts past its modules, and forgotten router biases."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from hybridlm.model.feed_forward.contract import FeedForward
from hybridlm.model.fp32_parameters import warn_of_narrow_tensors

log = logging.getLogger("hybridlm")


class TrainingWatch:
    """Warns once of each mistake of a training loop that shows when it calls `model.train()`."""

    def __init__(self) -> None:
        self.casts_are_checked = False
        self._calls = 0  # of `train()` since the last `post_optimizer_step`
        self._router_sample: Tensor | None = None
        self._warned = False

    def mode_is_set(self, model: nn.Module, training: bool) -> None:
        """Look at the model when its mode is set."""
        if not self.casts_are_checked:
            self.casts_are_checked = warn_of_narrow_tensors(model)
        if training and not self._warned:
            self._look_at_biases(model)

    def biases_have_followed(self) -> None:
        """Note that `post_optimizer_step` was called."""
        self._calls = 0

    def _look_at_biases(self, model: nn.Module) -> None:
        """Warn where an optimizer has moved a router since the last `post_optimizer_step`.

        Looking waits for a GPU, so it is done at calls 4, 8, 16, ... of a loop that calls `train()` in every step.
        """
        self._calls += 1
        if self._calls == 2 or self._calls & (self._calls - 1):
            return
        if any(hasattr(p, "ds_id") for p in model.parameters()):  # ZeRO-3: looking would bring weights together
            return
        weights = (m.balanced_weight() for m in model.modules() if isinstance(m, FeedForward))
        weight = next((w for w in weights if w is not None), None)
        if weight is None or weight.is_meta:
            return
        sample = weight.detach().flatten()[:16].clone()
        if self._calls == 1 or self._router_sample is None:
            self._router_sample = sample
        elif not torch.equal(sample, self._router_sample.to(sample)):
            self._warned = True
            log.warning("an optimizer trains routers, but their biases do not follow: experts will be used unevenly. "
                        "Call model.post_optimizer_step() after each step, or give the trainer "
                        "hybridlm.interop.RouterBiasCallback()")
