"""Gradients of opaque operations: the graph of one call, kept between its forward and its backward.

A backend keeps for its backward whatever it likes: how many tensors, and of which sizes, may depend on the borders of
the documents. A compiled graph could not hold them, so they stay here, and the graph holds a handle: a tensor on the
host that owns them through its memory. When the graph drops the handle (after the backward, or because activation
checkpointing computes the layer again), they are gone too.

Only inputs and outputs of a call are known to the compiler, which may write over their memory once it needs them no
longer. So of what a backend keeps, those inputs and outputs that the operation declares are handed to the backward by
the graph, and any others are copied.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

_numbers = itertools.count()
_calls: dict[int, RecordedCall] = {}


class _Owner(np.ndarray):
    """Memory of a handle; the call it owns is dropped with it."""


@dataclass(eq=False)
class _Kept:
    """A tensor that a backend keeps for its backward: itself, or its place in the memory of a declared tensor."""

    tensor: Tensor | None
    declared: int = -1  # index among the declared tensors
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0  # in elements from the start of the declared tensor


@dataclass(eq=False)
class RecordedCall:
    """The graph of one call: the edges at its differentiable inputs and outputs, and the way to what backends kept."""

    inputs: list[GradientEdge] = field(default_factory=list)
    shapes: list[tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=list)  # of these inputs
    outputs: list[GradientEdge | None] = field(default_factory=list)  # None where there is no gradient
    declared: list[tuple[torch.Size, tuple[int, ...]]] = field(default_factory=list)  # sizes and strides
    given: Sequence[Tensor] = ()  # the declared tensors, while the backward runs

    def unpack(self, kept: _Kept) -> Tensor:
        """The tensor that the backend kept."""
        if kept.tensor is not None:
            return kept.tensor
        size, stride = self.declared[kept.declared]
        given = self.given[kept.declared]
        if given.stride() != stride:  # the graph has computed it again, with another layout
            given = torch.empty_strided(size, stride, dtype=given.dtype, device=given.device).copy_(given)
        return given.as_strided(kept.size, kept.stride, given.storage_offset() + kept.offset)


@contextmanager
def autograd_on() -> Iterator[None]:
    """Context in which autograd records, also inside the kernel of a custom operation, where torch switches it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def record_call(run: Callable[[list[Any]], list[Tensor]], flat: list[Any], differentiable: Sequence[int],
                declared: Sequence[int], declared_outputs: Sequence[int]) -> list[Tensor]:
    """Run an operation, and keep its graph.

    Args:
        run: the operation on a flat list of arguments.
        flat: the arguments.
        differentiable: places of those that get gradients.
        declared: places of the tensors that `backward_of` will be handed.
        declared_outputs: indices of the outputs that it will be handed, too.

    Returns:
        The outputs, then the handle.
    """
    call = RecordedCall()
    kept: list[_Kept] = []

    def pack(tensor: Tensor) -> _Kept:
        kept.append(_Kept(tensor))
        return kept[-1]

    with autograd_on():
        leaves = list(flat)
        for place in differentiable:
            leaves[place] = flat[place].detach().requires_grad_()
        inputs = [leaves[place] for place in differentiable]
        with torch.autograd.graph.saved_tensors_hooks(pack, call.unpack):
            outputs = run(leaves)
        call.inputs = [get_gradient_edge(x) for x in inputs]
        call.outputs = [get_gradient_edge(x) if x.requires_grad else None for x in outputs]
    call.shapes = [(x.shape, x.dtype, x.device) for x in inputs]
    returned = with_own_memory([x.detach() for x in outputs], flat)
    tensors = [flat[place] for place in declared] + [returned[index] for index in declared_outputs]
    _hand_over(call, kept, [x for x in (*flat, *returned) if isinstance(x, Tensor)],
               [x for x in tensors if x is not None])
    for leaf in inputs:  # the graph holds its leaves: here they hold no memory
        leaf.data = leaf.data.new_empty(0)
    return [*returned, _handle_of(call)]


def with_own_memory(outputs: list[Tensor], flat: list[Any]) -> list[Tensor]:
    """The outputs, contiguous, each in memory of its own: what the compiler takes for granted."""
    taken = {x.untyped_storage().data_ptr() for x in flat if isinstance(x, Tensor) and x.numel()}
    found = []
    for output in outputs:
        x = output.contiguous()
        if x.numel() and x.untyped_storage().data_ptr() in taken:
            x = x.clone()
        taken.add(x.untyped_storage().data_ptr())
        found.append(x)
    return found


def _hand_over(call: RecordedCall, kept: list[_Kept], tensors: list[Tensor], declared: list[Tensor]) -> None:
    """Leave the memory of inputs and outputs to the graph: kept tensors in it become places in declared ones or copies.

    Args:
        call: learns the layout of the declared tensors.
        kept: what backends kept.
        tensors: all inputs and outputs.
        declared: those that the backward will be handed.
    """
    owned = {x.untyped_storage().data_ptr() for x in tensors}
    by_memory = {x.untyped_storage().data_ptr(): i for i, x in enumerate(declared) if 0 not in x.stride()}
    call.declared = [(x.size(), x.stride()) for x in declared]
    for item in kept:
        tensor = item.tensor
        assert tensor is not None
        memory = tensor.untyped_storage().data_ptr()
        if memory not in owned or not tensor.numel():
            continue
        base = declared[by_memory[memory]] if memory in by_memory else None
        if base is None or base.dtype != tensor.dtype or tensor.storage_offset() < base.storage_offset():
            item.tensor = tensor.detach().clone()
            continue
        item.tensor, item.declared = None, by_memory[memory]
        item.size, item.stride = tuple(tensor.size()), tensor.stride()
        item.offset = int(tensor.storage_offset() - base.storage_offset())


def _handle_of(call: RecordedCall) -> Tensor:
    """A tensor that owns the call: the call goes when the last tensor on its memory does."""
    number = next(_numbers)
    owner = np.array([number], dtype=np.int64).view(_Owner)
    _calls[number] = call
    weakref.finalize(owner, _drop, number)
    return torch.from_numpy(owner)


def _drop(number: int) -> None:
    """Forget a call. Its graph refers to it, through autograd's C++, so the graph is let go of by hand."""
    call = _calls.pop(number, None)
    if call is not None:
        call.outputs, call.inputs = [], []


def backward_of(handle: Tensor, grads: Sequence[Tensor | None], declared: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a recorded call by its differentiable inputs, contiguous.

    Args:
        handle: what `record_call` returned last.
        grads: gradients by its outputs; None for zero.
        declared: its declared tensors, those that were None left out.

    Raises:
        RuntimeError: the call is not there any more.
    """
    call = _calls.get(int(handle))
    if call is None:
        raise RuntimeError("the forward of a compiled operation is gone: its handle was copied, or sent elsewhere")
    pairs = [(edge, grad) for edge, grad in zip(call.outputs, grads, strict=True)
             if edge is not None and grad is not None]
    call.given = declared
    try:
        with autograd_on():
            found = torch.autograd.grad([edge for edge, _ in pairs], call.inputs, [grad for _, grad in pairs],
                                        allow_unused=True, retain_graph=True) if pairs else [None] * len(call.inputs)
    finally:
        call.given = ()
    return [torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad.contiguous()
            for (shape, dtype, device), grad in zip(call.shapes, found, strict=True)]


def recorded_calls() -> int:
    """Number of calls whose graphs are kept now."""
    return len(_calls)
