"""Records the Triton launches of a call without running them: kernels, types, constants and grids, as on a GPU in 16
bits.

Tensors stay on the CPU and kernels are not run, so what a call returns is meaningless; which launches it makes
depends on shapes and types alone. Documents are never cut into segments, which depends on the number of
multiprocessors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hybridlm_kernels import registry, triton_support
from hybridlm_kernels.cases import BenchCase, Inputs, Shape
from hybridlm_kernels.triton_support import INTERPRETED

PASSES = ("forward", "backward")
TRITON_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
                torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8"}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its tensors' types, its other arguments by name, its grid and the compiler's options.

    `grid_with` is the grid where some constants have other values.
    """

    part: str  # one of PASSES
    kernel: Any
    name: str
    dtypes: Mapping[str, torch.dtype]
    constants: Mapping[str, Any]
    grid: tuple[int, ...]
    options: Mapping[str, int]
    grid_with: Callable[[Mapping[str, Any]], tuple[int, ...]]

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return math.prod(self.grid)

    @property
    def source(self) -> Any:
        """The kernel with its signature and constants, as triton compiles it at this launch."""
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            name = parameter.name
            if name in self.dtypes:
                signature[name] = TRITON_TYPES[self.dtypes[name]]
                attributes[place,] = [["tt.divisibility", 16]]
                continue
            value = self.constants[name]
            specialised = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialised and value == 1 and type(value) is int):
                signature[name], constants[place,] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if specialised and value % 16 == 0:
                    attributes[place,] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)


def launches_of(case: BenchCase, shape: Shape, dtype: torch.dtype = torch.bfloat16,
                within: Callable[[str], AbstractContextManager[Any]] = nullcontext) -> list[Launch]:
    """The launches of the Triton backend for a case at a shape, forward and backward, in their order.

    `within(part)` is a context in which a pass runs.

    Raises:
        KernelUnavailable: the Triton backend does not take the call.
    """
    found: list[Launch] = []
    part = [PASSES[0]]

    def note(kernel: Any, named: dict[str, Any], grid: Any, options: Mapping[str, int]) -> None:
        found.append(_launch(part[0], kernel, named, grid, options))

    def entered(name: str) -> AbstractContextManager[Any]:
        part[0] = name
        return within(name)

    torch.manual_seed(0)
    with triton_on_cpu(), _noting_launches(note):
        run_case(case, case.make(shape, dtype, "cpu"), "triton", entered)
    return found


def run_case(case: BenchCase, inputs: Inputs, backend: str,
             within: Callable[[str], AbstractContextManager[Any]] = nullcontext) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output of a case and the gradients of what it trains; each pass runs in the context `within(part)`."""
    trained = {name: inputs[name].requires_grad_() for name in case.trained if name in inputs}
    with within(PASSES[0]):
        out = case.run(inputs, backend)
    if not trained:
        return out, {}
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    with within(PASSES[1]):
        grads = torch.autograd.grad(out, list(trained.values()), upstream)
    return out.detach(), dict(zip(trained, grads, strict=True))


def seconds_of_launches(case: BenchCase, shape: Shape, rounds: int = 3) -> list[tuple[str, float]]:
    """Kernel and seconds of each launch of a case on the current CUDA device, in bfloat16: the fastest of some rounds.

    Events around a launch time it: a few microseconds of the launch itself are part of its time.
    """
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    timed: list[tuple[str, Any, Any]] = []

    def run(kernel: Any, *args: Any, **named: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = launch(kernel, *args, **named)
        end.record()
        timed.append((kernel.fn.__name__, start, end))
        return result

    torch.manual_seed(0)
    inputs = case.make(shape, torch.bfloat16, "cuda")
    found: list[list[tuple[str, float]]] = []
    for turn in range(rounds + 1):
        timed.clear()
        with mock.patch.object(JITFunction, "run", run):
            run_case(case, {name: x.detach() for name, x in inputs.items()}, "triton")
        torch.cuda.synchronize()
        if turn:  # the first one compiles
            found.append([(name, start.elapsed_time(end) / 1e3) for name, start, end in timed])
    return [(launches[0][0], min(seconds for _, seconds in launches)) for launches in zip(*found, strict=True)]


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Context in which Triton backends take tensors of any type on the CPU, to note or interpret their launches."""
    backends = [backend for op in registry.operations() for backend in op.backends if backend.name == "triton"]
    devices = [backend.devices for backend in backends]
    with mock.patch.object(triton_support, "_problem", return_value=""):
        for backend in backends:
            object.__setattr__(backend, "devices", ("cpu",))  # frozen, so that nothing else can
        registry.configure({})  # forgets what was decided
        try:
            yield
        finally:
            for backend, before in zip(backends, devices, strict=True):
                object.__setattr__(backend, "devices", before)
            registry.configure({})


@contextmanager
def _noting_launches(note: Callable[[Any, dict[str, Any], Any, Mapping[str, int]], None]) -> Iterator[None]:
    """Context in which kernels are not run: `note(kernel, arguments by name, grid, options)` is called instead."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    def first_configuration(tuner: Any, *args: Any, **constants: Any) -> Any:
        return tuner.fn.run(*args, **(tuner.configs[0].all_kwargs() | constants))

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | {
            name: value for name, value in named.items() if name in kernel.arg_names}
        options = {"num_warps": named.get("num_warps", 4), "num_stages": named.get("num_stages", 3)}
        note(kernel, arguments, grid, options)

    def interpret(executor: Any, *args: Any, **named: Any) -> None:
        note(executor, bound_arguments(executor, args, named), executor.grid, {})

    with mock.patch.object(Autotuner, "run", first_configuration), mock.patch.object(JITFunction, "run", launch), (
            mock.patch.object(GridExecutor, "__call__", interpret)):
        yield


def bound_arguments(executor: Any, args: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an interpreted launch by the names of the kernel's parameters."""
    parameters = inspect.signature(executor.fn).parameters
    return inspect.getcallargs(executor.fn, *args, **{k: v for k, v in named.items() if k in parameters})


def _launch(part: str, kernel: Any, named: dict[str, Any], grid: Any, options: Mapping[str, int]) -> Launch:
    constants = {key: value for key, value in named.items() if not isinstance(value, Tensor)}

    def grid_with(changed: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(int(n) for n in (grid(constants | dict(changed)) if callable(grid) else grid))

    return Launch(part, None if INTERPRETED else kernel, kernel.fn.__name__,
                  {key: value.dtype for key, value in named.items() if isinstance(value, Tensor)}, constants,
                  grid_with({}), dict(options), grid_with)
