"""Checks of the computation: causality, packed documents, decoding, gradients, recomputation, half precision.

B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridlm.errors import counted
from hybridlm.model.contract_check.subject import Subject, is_kept_in_fp32, round_weights
from hybridlm.model.contract_check.verdicts import (
    ContractViolation,
    largest_difference,
    require,
    require_close,
)
from hybridlm_kernels.packing import CuSeqlens

LEARNING_LENGTH = 80  # tokens: longer than a window of 64, behind which some mixers have a part of their own
CAUSAL_LENGTH = 131  # tokens: two chunks of 64 and three tokens of a third
CHANGED_TOKENS = (1, 15, 16, 63, 64, 127, 128)  # indices on both sides of borders between chunks of 16 and 64
DOCUMENTS = (0, 1, 6, 70, 75, 140, 143, 150)  # borders in two rows of 75 tokens
PADDED_TABLE = (0, 0, 1, 6, 6, 70, 75, 75, 140, 143, 150, 150)  # the same with documents that have no token
DECODED_LENGTHS = {"token by token": (1,) * 23, "in chunks": (7, 1, 12, 3), "after a prompt": (20, 1, 1, 1)}
STEP_SIZES = (1e-5, 1e-6, 1e-7)  # of finite differences; a smaller one steps over fewer jumps of a selection
GRADIENT_RTOL = 1e-5  # relative to the norm of the gradient
HALF_PRECISION_RTOL = 0.03  # relative to the norm of a token's output


def check_causality(subject: Subject) -> str:
    """A change of one token changes no earlier output, bit for bit, and changes the output of that token.

    Where a module is piecewise constant, it has to change the output of one of the tokens that are tried.

    Returns:
        The reason why the check passed, as every check does.

    Raises:
        ContractViolation: a message with what was found and what was expected, as in every check.
    """
    module = subject.build(torch.float32)
    x_BTD = subject.inputs(1, CAUSAL_LENGTH, torch.float32)
    with torch.no_grad():
        unchanged: list[int] = []
        y_BTD, _ = subject.run(module, x_BTD)
        require(y_BTD.shape == x_BTD.shape, f"outputs have shape {list(y_BTD.shape)}, inputs {list(x_BTD.shape)}")
        for t in CHANGED_TOKENS:
            changed_BTD = x_BTD.clone()
            changed_BTD[:, t] += 1.0
            y_changed_BTD, _ = subject.run(module, changed_BTD)
            if not torch.equal(y_changed_BTD[:, :t], y_BTD[:, :t]):
                first = int((y_changed_BTD != y_BTD).any(-1).nonzero()[0, 1])
                difference = largest_difference(y_changed_BTD[:, :t], y_BTD[:, :t])
                raise ContractViolation(f"a change of token {t} changes the output of token {first}, by up to "
                                        f"{difference:.1e}: outputs must not depend on later tokens, in rounding "
                                        "either")
            if torch.equal(y_changed_BTD[:, t], y_BTD[:, t]):
                unchanged.append(t)
    may_stay = len(CHANGED_TOKENS) - 1 if getattr(module, "piecewise_constant", ()) else 0
    if len(unchanged) > may_stay:
        raise ContractViolation(f"the output of token {unchanged[0]} does not depend on token {unchanged[0]}")
    return f"earlier outputs stay bitwise equal when one of {len(CHANGED_TOKENS)} tokens changes"


def check_packed_documents(subject: Subject) -> str:
    """Packed documents have the outputs and gradients (of inputs and parameters) of separate ones."""
    module = subject.build()
    x_BTD = subject.inputs(2, 75).requires_grad_()
    weights = _output_weights(DOCUMENTS[-1], x_BTD.shape[-1])
    packed = subject.run(module, x_BTD, CuSeqlens(PADDED_TABLE))[0].flatten(0, 1)
    packed_grads = _gradients(module, x_BTD, (packed * weights).sum())
    rows = x_BTD.flatten(0, 1)
    alone = torch.cat([subject.run(module, rows[None, start:stop])[0][0]
                       for start, stop in itertools.pairwise(DOCUMENTS)])
    grads = _gradients(module, x_BTD, (alone * weights).sum())
    require_close(packed, alone, "outputs of packed and of separate documents", rtol=1e-9, atol=1e-10)
    for name, grad in packed_grads.items():
        require_close(grad, grads[name], f"gradients of {name} with packed and with separate documents",
                      rtol=1e-8, atol=1e-9)
    return f"{len(DOCUMENTS) - 1} documents in 2 rows equal the documents alone, gradients too"


@torch.no_grad()
def check_decoding(subject: Subject) -> str:
    """Decoding in several forwards with the decode state gives the outputs of one forward."""
    module = subject.build()
    x_BTD = subject.inputs(2, 23)
    y_BTD, _ = subject.run(module, x_BTD)
    for how, lengths in DECODED_LENGTHS.items():
        state = subject.new_state(module, *x_BTD.shape[:2])
        done = 0
        outputs = []
        for length in lengths:
            outputs.append(subject.run(module, x_BTD[:, done : done + length], state=state, offset=done)[0])
            done += length
        require_close(torch.cat(outputs, 1), y_BTD, f"outputs {how} and of one forward", rtol=1e-8, atol=1e-9)
    step = module.eval().prepare_step()
    if step is None:
        return f"{', '.join(DECODED_LENGTHS)} as in one forward"
    for before, way in ((0, "from an empty state"), (9, "behind a forward")):
        state = subject.new_state(module, *x_BTD.shape[:2])
        outputs = [subject.run(module, x_BTD[:, :before], state=state)[0]] if before else []
        outputs += [subject.step(step, x_BTD[:, t : t + 1], state, t) for t in range(before, 20)]
        outputs.append(subject.run(module, x_BTD[:, 20:], state=state, offset=20)[0])
        require_close(torch.cat(outputs, 1), y_BTD, f"outputs of the prepared step {way} and of one forward",
                      rtol=1e-8, atol=1e-9)
    one = subject.step(step, x_BTD[:1, :1], subject.new_state(module, 1, 1), 0)
    require_close(one, y_BTD[:1, :1], "outputs of the prepared step and of the forward for one row", rtol=1e-8,
                  atol=1e-9)
    return f"{', '.join(DECODED_LENGTHS)} and by the prepared step as in one forward"


def check_gradients(subject: Subject) -> str:
    """Gradients of inputs and of every parameter agree with finite differences in fp64, along a random direction.

    An error in one entry shows with probability 1, since the direction has no zero. Where a module says that it is
    piecewise constant, no small step may change the loss.
    """
    module = subject.build()
    x_BTD = subject.inputs(1, 14)
    weights = _output_weights(*x_BTD.shape[1:])

    def loss() -> Tensor:
        return (subject.run(module, x_BTD)[0] * weights).sum()

    x_BTD.requires_grad_()
    grads = _gradients(module, x_BTD, loss())
    x_BTD.requires_grad_(False)
    tensors = dict(module.named_parameters())
    if all(read.kind.gradient for read in subject.reads):  # else the inputs act through values without gradient too
        tensors["the inputs"] = x_BTD
    constant = {*getattr(module, "piecewise_constant", ())}
    if constant:
        constant.add("the inputs")
        unknown = sorted(constant - tensors.keys())
        require(not unknown, f"piecewise_constant names {', '.join(unknown)}, which the module does not have")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        direction = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
        grad = grads.get(name, torch.zeros_like(tensor))
        by_autograd = float((grad * direction).sum())
        tolerance = GRADIENT_RTOL * float(grad.norm()) + 1e-7
        by_differences = [_directional_difference(loss, tensor, direction, step) for step in STEP_SIZES]
        if name in constant:
            require(0.0 in by_differences, f"{name} is said to be piecewise constant, but the smallest step "
                    f"changes the loss by {by_differences[-1]:.6g} times its size")
            continue
        nearest = min(by_differences, key=lambda value: abs(value - by_autograd))
        require(abs(nearest - by_autograd) <= tolerance,
                f"gradient of {name}: autograd gives {by_autograd:.6g} along a random direction, finite differences "
                f"{nearest:.6g}; {tolerance:.1e} is allowed")
    compared = tensors.keys() - constant
    parameters = counted(len(compared - {"the inputs"}), "parameter")
    reason = f"autograd agrees with finite differences for {parameters}{' and the inputs' * ('the inputs' in compared)}"
    return reason + (f"; piecewise constant: {', '.join(name for name in tensors if name in constant)}" if constant
                     else "")


@torch.no_grad()
def _directional_difference(loss: Callable[[], Tensor], tensor: Tensor, direction: Tensor, step: float) -> float:
    before = tensor.clone()
    tensor.copy_(before + step * direction)
    above = loss()
    tensor.copy_(before - step * direction)
    below = loss()
    tensor.copy_(before)
    return float(above - below) / (2 * step)


def check_every_parameter_learns(subject: Subject) -> str:
    """Every parameter gets a gradient that is not zero, from the outputs or from a loss of the module's own."""
    module = subject.build()
    y_BTD, aux = subject.run(module, subject.inputs(2, LEARNING_LENGTH))
    (y_BTD.square().sum() + sum(value for name, value in aux.items() if name.startswith("loss/"))).backward()
    without = [name for name, p in module.named_parameters() if p.grad is None or not float(p.grad.abs().sum()) > 0]
    require(not without, f"no gradient reaches {', '.join(without)}")
    return "a gradient reaches every parameter"


def check_training_after_inference(subject: Subject) -> str:
    """A forward under `torch.inference_mode` caches no tensor that breaks a later backward."""
    module = subject.build()
    x_BTD = subject.inputs(1, 9)
    with torch.inference_mode():
        first, _ = subject.run(module, x_BTD)
    second, _ = subject.run(module, x_BTD.requires_grad_())
    second.sum().backward()
    require(torch.equal(first, second.detach()), "outputs in training differ from those of inference")
    return "a backward runs after inference, and outputs are equal"


def check_activation_checkpointing(subject: Subject) -> str:
    """Activation checkpointing, which computes the forward again in the backward, changes no output and no gradient."""
    module = subject.build(torch.float32)
    results = []
    for recompute in (False, True):
        x_BTD = subject.inputs(2, 40, torch.float32).requires_grad_()
        if recompute:
            y_BTD, aux = checkpoint(partial(subject.run, module), x_BTD, use_reentrant=False)
        else:
            y_BTD, aux = subject.run(module, x_BTD)
        loss = y_BTD.square().sum() + sum(value for name, value in aux.items() if name.startswith("loss/"))
        results.append({"the outputs": y_BTD.detach(), **_gradients(module, x_BTD, loss)})
    plain, recomputed = results
    for name, value in plain.items():
        require(torch.equal(value, recomputed[name]), f"{name} differ with activation checkpointing, by up to "
                f"{largest_difference(value, recomputed[name]):.1e}")
    return "outputs and gradients are bitwise the same with it and without"


def check_half_precision(subject: Subject) -> str:
    """Outputs stay near those in fp32 under autocast to bf16, and with weights in bf16 except `fp32_parameters`.

    The error is the median over tokens: a rounded score may choose another key or another expert for a few of them.
    """
    module = subject.build(torch.float32)
    x_BTD = subject.inputs(1, 24, torch.float32)
    y_BTD = subject.run(module, x_BTD)[0]
    with torch.autocast("cpu", torch.bfloat16):
        x_again = x_BTD.clone().requires_grad_()
        autocast_BTD = subject.run(module, x_again)[0]
    grads = _gradients(module, x_again, autocast_BTD.float().square().sum())
    broken = [name for name, grad in grads.items() if grad.dtype != torch.float32 or not bool(grad.isfinite().all())]
    require(not broken, f"gradients of {', '.join(broken)} are not finite, or not in fp32, under autocast to bf16")
    round_weights(module)
    half_BTD = subject.run(module, x_BTD.bfloat16())[0]
    require(half_BTD.dtype == torch.bfloat16, f"outputs for inputs in bf16 are {half_BTD.dtype}, expected bf16")
    errors = []
    for how, found in (("under autocast", autocast_BTD), ("with weights in bf16", half_BTD)):
        error = float(((found.float() - y_BTD).norm(dim=-1) / y_BTD.norm(dim=-1)).detach().median())
        require(error < HALF_PRECISION_RTOL, f"outputs {how} are {error:.1%} away from those in fp32, expected below "
                f"{HALF_PRECISION_RTOL:.0%}: which parameters belong into fp32_parameters?")
        errors.append(f"{error:.1%} {how}")
    return f"error against fp32: {', '.join(errors)}"


def check_fp32_parameters(subject: Subject) -> str:
    """`fp32_parameters` names every vector that is no bias: bf16 is too coarse for norms, decays and gates."""
    module = subject.new_module()
    names = module.fp32_parameters
    require(isinstance(names, tuple) and all(isinstance(name, str) for name in names),
            f"fp32_parameters is {names!r}, expected a tuple of names")
    rounded = [name for name, p in module.named_parameters()
               if p.ndim < 2 and name.rpartition(".")[2] != "bias" and not is_kept_in_fp32(module, name)]
    require(not rounded, f"{', '.join(rounded)}: vectors that bf16 would round; name them in fp32_parameters")
    kept = [name for name, _ in module.named_parameters() if is_kept_in_fp32(module, name)]
    return f"kept in fp32: {', '.join(kept) or 'nothing, and there is no vector'}"


def _output_weights(length: int, width: int) -> Tensor:
    """Fixed weights [T, D] that make one loss of all outputs."""
    return torch.randn(length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def _gradients(module: Any, x_BTD: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the inputs and of the parameters that get one, by name; none is left in the module."""
    module.zero_grad()
    x_BTD.grad = None
    loss.backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    require(x_BTD.grad is not None, "the inputs get no gradient")
    result = {"the inputs": x_BTD.grad, **grads}
    module.zero_grad()
    x_BTD.grad = None
    return result  # type: ignore[return-value]
