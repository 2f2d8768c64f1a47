"""Counts what the Triton kernels of a call do, executed in Triton's interpreter: bytes, products, exponentials.

A call runs twice. In bfloat16 with launches noted and not run, which says the types of every launch and what torch
does between them; then in float32, because the interpreter cannot compute in bfloat16, with every load, store and
product counted in the types of the first run, in tiles of its sizes. The result of the second run is compared with
the torch backend, so that what is counted is work that was done.

"Requested" bytes are all that programs load and store. "Unique" bytes are those that a launch reads or writes for the
first time, without what it wrote itself: the memory traffic if the cache forgets everything between launches and
nothing within.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridlm_kernels.cases import BenchCase, Shape
from hybridlm_kernels.tools.kernel_launches import (
    PASSES,
    Launch,
    bound_arguments,
    launches_of,
    run_case,
    triton_on_cpu,
)
from hybridlm_kernels.triton_support import INTERPRETED, tiles_as_for

EXPONENTIALS = ("create_exp", "create_exp2")
MIN_TORCH_BYTES = 256  # operations of torch on less are sizes and flags


@dataclass
class LaunchWork:
    """The work of one launch."""

    part: str
    kernel: str
    requested_loads: int = 0  # bytes
    requested_stores: int = 0
    unique_reads: int = 0
    unique_writes: int = 0
    product_flops: int = 0  # a multiplication and an addition are two
    exponentials: int = 0

    @property
    def requested(self) -> int:
        """Bytes that programs load and store."""
        return self.requested_loads + self.requested_stores

    @property
    def unique(self) -> int:
        """Bytes that are read or written for the first time."""
        return self.unique_reads + self.unique_writes


@dataclass(frozen=True)
class CallWork:
    """The work of a call: its launches, the bytes of torch's own operations, and the error against torch's backend.

    `error` is the largest RMS difference of an output or gradient, divided by its RMS.
    """

    launches: tuple[LaunchWork, ...]
    torch_bytes: dict[str, int]  # by pass
    torch_operations: dict[str, int]
    error: float

    def total(self, part: str, name: str) -> int:
        """The sum of a figure of `LaunchWork` over the launches of a pass."""
        return sum(getattr(launch, name) for launch in self.launches if launch.part == part)


def count_work(case: BenchCase, shape: Shape) -> CallWork:
    """Count what the Triton backend does for a case at a shape, in bfloat16.

    Raises:
        RuntimeError: kernels are not interpreted in this process, or the two runs launch different kernels.
    """
    if not INTERPRETED:
        raise RuntimeError("counting needs TRITON_INTERPRET=1 before Python starts")
    watches = {part: _TorchWatch() for part in PASSES}
    between = iter(launches_of(case, shape, within=watches.__getitem__))
    launches: list[LaunchWork] = []
    torch.manual_seed(0)
    inputs = case.make(shape, torch.float32, "cpu")
    with triton_on_cpu(), tiles_as_for(torch.bfloat16), _counting(between, launches):
        got = run_case(case, dict(inputs), "triton")
    if left := list(between):
        raise RuntimeError(f"float32 makes {len(left)} launches fewer than bfloat16, from {left[0].name} on")
    expected = run_case(case, {name: x.detach() for name, x in inputs.items()}, "torch")
    pairs = [(got[0], expected[0]), *((got[1][name], expected[1][name]) for name in expected[1])]
    return CallWork(tuple(launches), {part: watch.bytes for part, watch in watches.items()},
                    {part: watch.operations for part, watch in watches.items()}, max(_error(a, b) for a, b in pairs))


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


class _TorchWatch(TorchDispatchMode):
    """Adds up the bytes of torch's operations that are no views and no empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if is_view or not returns or "empty" in func.name():
            return out
        size = sum(x.nbytes for x in _tensors(args)) + sum(x.nbytes for x in _tensors(out))
        if size > MIN_TORCH_BYTES:
            self.bytes += size
            self.operations += 1
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _tensors(x)


@dataclass
class _Region:
    """The memory of a tensor: which of its elements a launch has read before writing, and written."""

    start: int
    end: int
    stored_size: int  # bytes of an element as executed
    counted_size: int  # bytes of an element as on a GPU
    read: np.ndarray
    written: np.ndarray


@dataclass
class _Counter:
    """Counts one launch."""

    work: LaunchWork
    regions: list[_Region] = field(default_factory=list)

    def add(self, tensor: Tensor, dtype: torch.dtype) -> None:
        """Take in the memory of an argument, once."""
        storage = tensor.untyped_storage()
        if not tensor.numel() or any(region.start == storage.data_ptr() for region in self.regions):
            return
        elements = storage.nbytes() // tensor.element_size()
        self.regions.append(_Region(storage.data_ptr(), storage.data_ptr() + storage.nbytes(), tensor.element_size(),
                                    dtype.itemsize, np.zeros(elements, bool), np.zeros(elements, bool)))

    def touch(self, pointers: Any, mask: Any, write: bool) -> None:
        """Count one load or store."""
        addresses = pointers.data
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = np.ravel(addresses)
        if not addresses.size:
            return
        region = next(r for r in self.regions if r.start <= int(addresses[0]) < r.end)
        places = ((addresses - np.uint64(region.start)) // np.uint64(region.stored_size)).astype(np.int64)
        size = addresses.size * region.counted_size
        if write:
            self.work.requested_stores += size
            region.written[places] = True
        else:
            self.work.requested_loads += size
            region.read[places[~region.written[places]]] = True

    def finish(self) -> None:
        """Add up what was touched."""
        self.work.unique_reads = sum(int(r.read.sum()) * r.counted_size for r in self.regions)
        self.work.unique_writes = sum(int(r.written.sum()) * r.counted_size for r in self.regions)


@contextmanager
def _counting(recorded: Iterator[Launch], launches: list[LaunchWork]) -> Iterator[None]:
    """Context in which interpreted launches are counted, with the types and constants of the recorded ones."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    execute = interpreter.GridExecutor.__call__
    current: list[_Counter] = []

    def launch(executor: Any, *args: Any, **named: Any) -> None:
        like = next(recorded, None)
        if like is None or like.name != executor.fn.__name__:
            raise RuntimeError(f"float32 launches {executor.fn.__name__} where bfloat16 launches "
                               f"{like.name if like else 'nothing'}")
        arguments = bound_arguments(executor, args, named)
        counter = _Counter(LaunchWork(like.part, like.name))
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                counter.add(value, like.dtypes[name])
        # Flags that say "float32" take the values they have in bfloat16: the kernel then takes the same way.
        arguments |= {name: value for name, value in like.constants.items() if isinstance(value, bool | str)}
        current.append(counter)
        try:
            execute(executor, **arguments)
        finally:
            current.clear()
        counter.finish()
        launches.append(counter.work)

    def on(name: str, count: Callable[..., None]) -> Any:
        plain = getattr(builder, name)

        def counted(self: Any, *args: Any) -> Any:
            if current:
                count(*args)
            return plain(self, *args)

        return mock.patch.object(builder, name, counted)

    def count_load(pointers: Any, mask: Any, *_: Any) -> None:
        current[0].touch(pointers, mask, False)

    def count_store(pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        current[0].touch(pointers, mask, True)

    def count_exponentials(x: Any, *_: Any) -> None:
        current[0].work.exponentials += x.data.size

    def count_product(a: Any, b: Any, *_: Any) -> None:
        current[0].work.product_flops += 2 * a.data.size * b.data.shape[-1]

    with ExitStack() as patches:
        for patch in _bfloat16_patches(interpreter):
            patches.enter_context(patch)
        patches.enter_context(on("create_masked_load", count_load))
        patches.enter_context(on("create_masked_store", count_store))
        patches.enter_context(on("create_dot", count_product))
        for name in EXPONENTIALS:
            patches.enter_context(on(name, count_exponentials))
        patches.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
        yield


def _bfloat16_patches(interpreter: Any) -> list[Any]:
    """Mends two faults of the interpreter: it casts integers to bfloat16 by bits, and cannot multiply in bfloat16."""
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_by_value(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar not in (tl.float32, tl.bfloat16):
            source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return cast(self, source, target)

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def multiply(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    return [mock.patch.object(builder, "cast_impl", cast_by_value), mock.patch.object(builder, "create_dot", multiply)]
