"""Guards against losses and gradients that are not finite: count the skipped steps, then name the first bad layer."""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.distributed.engine import Engine, LossFunction

log = logging.getLogger("hybridlm")


class TrainingStopped(Exception):
    """Raised when a run cannot continue for a reason that its config did not show; the text is a line for the user."""

    exit_code = 1


class TrainingDiverged(TrainingStopped):
    """Raised when losses, gradients or weights are no longer finite: a result, and no fault of the machine.

    Args:
        text: what was not finite and what to do, without `PREFIX`, by which the process that started the run knows.
    """

    PREFIX = "the run diverged: "

    def __init__(self, text: str):
        super().__init__(self.PREFIX + text)


NOTHING_BAD = "nothing: the same batch is finite when computed again, so look at the hardware"


class BadStepGuard:
    """Counts non-finite steps in a row and stops the run at `limit`."""

    def __init__(self, limit: int):
        self.limit = limit
        self.in_a_row = 0

    def count_step(self, good: bool) -> bool:
        """Count one step and return whether the run must stop."""
        self.in_a_row = 0 if good else self.in_a_row + 1
        return self.in_a_row >= self.limit


class GradientNormWatch:
    """Warns once where the norm of the gradient jumps far above its median in this stage.

    Delta rules in place of attention are known to diverge so while they are distilled (HypeNet, 2601.22156).
    """

    FACTOR, MIN_STEPS = 100.0, 20

    def __init__(self, stage: str):
        self.stage = stage
        self.norms: list[float] = []  # in ascending order
        self.warned = False

    def add(self, norm: float) -> None:
        """Count the norm of one step; not finite ones are skipped steps already."""
        if self.warned or not math.isfinite(norm):
            return
        median = self.norms[len(self.norms) // 2] if len(self.norms) >= self.MIN_STEPS else math.inf
        if norm > self.FACTOR * median:
            self.warned = True
            log.warning("stage %s: the gradient norm is %.3g, its median was %.3g: the new mixers may diverge; a "
                        "lower learning rate, or a stage without them (trainable), helps", self.stage, norm, median)
        bisect.insort(self.norms, norm)


def first_bad_layer(engine: Engine, compute_loss: LossFunction, micro_batches: Sequence[Any]) -> str:
    """Run the micro batches of a step again and name what first turns not finite.

    The search has this order: a weight, an output in the forward (innermost module first), a gradient in the
    backward (the module whose output first receives one). Ranks whose layers communicate continue
    together until one of them has found something.
    """
    weight = bad_weight(engine)
    found = [] if weight is None else [f"weight '{weight}' itself is not finite"]
    for micro_batch in micro_batches:
        if engine.all_max([len(found)])[0]:
            break
        with _watching(engine.model) as found:
            contribution = compute_loss(engine.wrapped, engine.move(micro_batch))
            if not found and not _finite(contribution.loss):
                found.append("the loss, computed from finite layers")
            if not engine.all_max([len(found)])[0]:
                engine.backward(contribution.loss)
        engine.model.zero_grad(set_to_none=True)
    return found[0] if found else NOTHING_BAD


def bad_weight(engine: Engine) -> str | None:
    """Name a weight or buffer of this rank that is not finite; None where there is none."""
    return next((name for name, tensor in engine.local_weights() if not _finite(tensor)), None)


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """Collects what is not finite, in the order in which it appears."""
    found: list[str] = []
    handles = [module.register_forward_hook(_output_watch(name, found))
               for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _output_watch(name: str, found: list[str]) -> Callable[..., None]:
    def watch(module: nn.Module, args: Any, output: Any) -> None:
        tensors = list(_floats(output))
        if not all(_finite(t) for t in tensors):
            inputs = all(_finite(t) for t in _floats(args))
            found.append(f"layer '{name}'" + ("" if inputs else ", whose input is not finite either"))
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(_gradient_watch(name, found))

    return watch


def _gradient_watch(name: str, found: list[str]) -> Callable[[Tensor], None]:
    def watch(grad: Tensor) -> None:
        if not _finite(grad):
            found.append(f"the gradient that reaches the output of layer '{name}'")

    return watch


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
