"""torch.compile: every operation is one node of the graph, or a formula that the compiler takes apart and fuses.

    @compilable(outputs=lambda x, *, backend=None: x.new_empty(x.shape))
    def relu2(x, *, backend=None): ...

makes `torch.ops.hybridlm.relu2`, of which torch knows the shapes of its outputs (`outputs`) and no more; inside it the
public function runs as ever and chooses its backend. Where gradients are wanted the graph has `relu2_recorded` and
`recorded_backward`, whose pair is any backend's own backward (`gradients.py`). Without torch.compile the public
function is called, and none of this takes part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, library

from hybridlm_kernels import registry
from hybridlm_kernels.compiling.arguments import Arguments
from hybridlm_kernels.compiling.gradients import backward_of, record_call, with_own_memory

NAMESPACE = "hybridlm"
LIBRARY = library.Library(NAMESPACE, "FRAGMENT")
# A replayed CUDA graph would run no Python, and the handles of recorded calls are made by Python.
TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
# In which backend the public function runs its operation, and which autocast surrounds it.
EXTRA = "str? backend, ScalarType? autocast"

_formulas: list[str] = []  # operations with one
F = TypeVar("F", bound=Callable[..., Any])


def compilable(outputs: Callable[..., Any], *, formula: Callable[..., Any] | None = None,
               keeps: tuple[str, ...] = (), keeps_outputs: tuple[int, ...] = ()) -> Callable[[F], F]:
    """Decorator of the public function of an operation, which makes torch.compile keep its graph whole.

    Args:
        outputs: takes the arguments of the public function, and returns empty tensors of the shapes, dtypes and device
            of its results, in the same structure (a tensor, a tuple, a named tuple, None where there is none). It
            reads shapes only, never the numbers of a tensor; of borders it may ask `num_documents`.
        formula: the same function of the same arguments (without `backend`) in plain torch operations. The compiler
            sees through it and fuses it with what surrounds it; it is used unless the call or `configure` names a
            backend.
        keeps: tensor parameters that backends keep for the backward. The graph then keeps them itself; those that are
            not named here are copied when a backend keeps them.
        keeps_outputs: indices of the outputs for which the same holds.
    """

    def decorate(public: F) -> F:
        node = _Node(public, outputs, keeps, keeps_outputs)
        names = node.arguments
        if formula is not None:
            _formulas.append(node.name)

        @functools.wraps(public)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():
                return public(*args, **kwargs)
            backend = kwargs.pop("backend", None)
            values = names.bind(args, kwargs)
            if formula is not None and backend is None and not registry.is_configured(node.name):
                return formula(**values)
            return node.call_in_graph(values, backend)

        return call  # type: ignore[return-value]

    return decorate


def fused_operations() -> list[str]:
    """Names of the operations that torch.compile takes apart and fuses, unless `configure` names a backend."""
    return [name for name in sorted(_formulas) if not registry.is_configured(name)]


class _Node:
    """The custom operations of one public function."""

    def __init__(self, public: Callable[..., Any], outputs: Callable[..., Any], keeps: tuple[str, ...],
                 keeps_outputs: tuple[int, ...]):
        self.public, self.outputs = public, outputs
        self.name = public.__name__
        self.arguments = Arguments(public)
        self.keeps, self.keeps_outputs = self.arguments.places(keeps), list(keeps_outputs)
        schema = f"({self.arguments.schema()}, {EXTRA}"
        self._define(self.name, f"{schema}) -> Tensor[]", self._run, self._fake)
        self._define(f"{self.name}_recorded", f"{schema}, int[] differentiable) -> Tensor[]", self._record,
                     self._fake_recorded)
        library.register_autograd(f"{NAMESPACE}::{self.name}_recorded", self._backward,
                          setup_context=self._setup_context, lib=LIBRARY)
        operations = getattr(torch.ops, NAMESPACE)
        self.plain = getattr(operations, self.name).default
        self.recorded = getattr(operations, f"{self.name}_recorded").default

    @staticmethod
    def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        LIBRARY.define(name + schema, tags=TAGS)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)

    def call_in_graph(self, values: dict[str, Any], backend: str | None) -> Any:
        """Call the custom operation; torch.compile traces this."""
        flat = self.arguments.spread(values)
        autocast = _autocast_dtype(flat)
        differentiable = [place for place, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
        if torch.is_grad_enabled() and differentiable:
            found = self.recorded(*flat, backend, autocast, differentiable)[:-1]
        else:
            found = self.plain(*flat, backend, autocast)
        return _fill(self.outputs(**values), iter(found))

    # Inside the graph: on tensors

    def _call(self, flat: list[Any], backend: str | None, autocast: torch.dtype | None) -> list[Tensor]:
        args, kwargs = self.arguments.gather(flat)
        with _autocast(flat, autocast):
            return list(_tensors(self.public(*args, **kwargs, backend=backend)))

    def _run(self, *flat: Any) -> list[Tensor]:
        *arguments, backend, autocast = flat
        with torch.no_grad():
            return with_own_memory(self._call(arguments, backend, autocast), arguments)

    def _record(self, *flat: Any) -> list[Tensor]:
        *arguments, backend, autocast, differentiable = flat
        return record_call(lambda leaves: self._call(leaves, backend, autocast), arguments, differentiable, self.keeps,
                           self.keeps_outputs)

    # Of shapes alone

    def _fake(self, *flat: Any) -> list[Tensor]:
        *arguments, _, autocast = flat
        args, kwargs = self.arguments.gather(arguments)
        with _autocast(arguments, autocast):
            return list(_tensors(self.outputs(*args, **kwargs)))

    def _fake_recorded(self, *flat: Any) -> list[Tensor]:
        return [*self._fake(*flat[:-1]), torch.empty(1, dtype=torch.int64)]

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        differentiable = inputs[-1]
        declared = [inputs[place] for place in self.keeps] + [output[index] for index in self.keeps_outputs]
        ctx.save_for_backward(output[-1], *(x for x in declared if x is not None))
        ctx.places, ctx.num_inputs = differentiable, len(inputs)
        ctx.sizes = [size for place in differentiable for size in inputs[place].shape]
        ctx.dims = [inputs[place].dim() for place in differentiable]
        ctx.dtypes = [inputs[place].dtype for place in differentiable]
        ctx.device = inputs[differentiable[0]].device

    def _backward(self, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        handle, *declared = ctx.saved_tensors
        found = torch.ops.hybridlm.recorded_backward(handle, grads[:-1], declared, ctx.sizes, ctx.dims, ctx.dtypes,
                                                     ctx.device)
        out: list[Any] = [None] * ctx.num_inputs
        for place, grad in zip(ctx.places, found, strict=True):
            out[place] = grad
        return tuple(out)


def _run_backward(handle: Tensor, grads: list[Tensor | None], declared: list[Tensor], sizes: list[int], dims: list[int],
                  dtypes: list[torch.dtype], device: torch.device) -> list[Tensor]:
    return backward_of(handle, grads, declared)


def _fake_backward(handle: Tensor, grads: list[Tensor | None], declared: list[Tensor], sizes: list[int],
                   dims: list[int], dtypes: list[torch.dtype], device: torch.device) -> list[Tensor]:
    shapes, left = [], list(sizes)
    for count in dims:
        shapes.append(left[:count])
        left = left[count:]
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]


_Node._define("recorded_backward", "(Tensor handle, Tensor?[] grads, Tensor[] declared, SymInt[] sizes, int[] dims, "
                                   "ScalarType[] dtypes, Device device) -> Tensor[]", _run_backward, _fake_backward)


def _autocast_dtype(flat: list[Any]) -> torch.dtype | None:
    """The dtype of the autocast around the call, None without; torch.compile traces this."""
    device = next(x.device.type for x in flat if isinstance(x, Tensor))
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast(flat: list[Any], dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """The autocast that surrounded the call when it was traced."""
    device = next(x.device.type for x in flat if isinstance(x, Tensor))
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a result in order: a tensor, nested tuples of them, None where there is none."""
    if isinstance(result, Tensor):
        yield result
    elif result is not None:
        for item in result:
            yield from _tensors(item)


def _fill(structure: Any, found: Iterator[Tensor]) -> Any:
    """The tensors `found` in the place of those in `structure`; torch.compile traces this."""
    if structure is None:
        return None
    if isinstance(structure, Tensor):
        return next(found)
    items = [_fill(item, found) for item in structure]
    return type(structure)(*items) if hasattr(structure, "_fields") else tuple(items)
