"""Cases of operations: calls that the doctor and the tests check, and calls that the benchmark times.

Each operation has a file `cases.py` with its own; `tools/cases.py` finds them. A benchmark runs at a shape of B rows, T
tokens, H heads of D dims. Its FLOPs are those of the mathematics, a multiplication and an addition counted as two: the
recurrence token by token for the linear family, the visible half of the scores for causal attention, so that backends
compare whatever they compute beyond that (chunks, recomputation). A backward counts twice the forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_MODEL_DIM = 4096  # operations without heads have H * D numbers per token, up to this


@dataclass(frozen=True)
class Shape:
    """B rows, T tokens per row, H heads, D dims per head."""

    B: int
    T: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} H{self.H} D{self.D}"

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.B * self.T

    @property
    def model_dim(self) -> int:
        """Numbers per token of the operations without heads."""
        return min(self.H * self.D, MAX_MODEL_DIM)


Inputs = dict[str, Tensor]
MakeInputs = Callable[[Shape, torch.dtype, str], Inputs]


class LoopTrips(NamedTuple):
    """The trips of a kernel's loops whose ends are data, on average over the programs that have work.

    `trips` has a number per loop, in the order of the code, inner loops before the loop around them. `busy` is the
    part of the programs that have work.
    """

    trips: Sequence[float]
    busy: float = 1.0



@dataclass(frozen=True)
class CheckCase:
    """One call to check against the reference.

    `inputs` makes fp64 tensors by name; floating ones get gradients unless named in `fixed`.
    """

    operation: str
    label: str
    run: Callable[..., Any]
    inputs: Callable[[], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    causal: bool = False  # time is dimension 1 of the inputs and of the first output


@dataclass(frozen=True)
class BenchCase:
    """One call to time. `make(shape, dtype, device)` gives its tensors by name; those in `trained` get gradients.

    Without any `trained`, the forward alone is timed.

    `loop_trips(shape, kernel, constants)` is for kernels whose work per token grows with the length or differs between
    programs. None: loops whose ends are data go over the chunks of a document (`tools/kernel_cost.py`).
    """

    label: str
    function: Callable[..., Any]
    make: MakeInputs
    flops: Callable[[Shape], float]  # of the forward
    trained: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    input_options: Callable[[Inputs], Mapping[str, Any]] = lambda inputs: {}  # options that follow from the inputs
    one_head_stands_for_all: bool = False  # heads do the same work and share nothing: what one costs says what all do
    loop_trips: Callable[[Shape, str, Mapping[str, Any]], LoopTrips] | None = None

    @property
    def operation(self) -> str:
        """The name of the operation."""
        return self.function.__name__

    def run(self, inputs: Inputs, backend: str | None) -> Tensor:
        """Runs the call; returns its first output."""
        out = self.function(**by_parameter(self.function, inputs), **self.options, **self.input_options(inputs),
                            backend=backend)
        return out[0] if isinstance(out, tuple) else out


OperationCases = tuple[list[CheckCase], list[BenchCase]]


def by_parameter(operation: Callable[..., Any], tensors: Inputs) -> Inputs:
    """Tensors under the parameter names of the operation, which carry shape suffixes (`q` is `q_BTHK`)."""
    parameters = inspect.signature(operation).parameters
    return {next((p for p in parameters if p == name or p.rsplit("_", 1)[0] == name), name): value
            for name, value in tensors.items()}


def randn(**shapes: tuple[int, ...]) -> Inputs:
    """Normal fp64 tensors of the named shapes."""
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def token_inputs(shapes: Callable[[Shape], dict[str, tuple[int, ...]]]) -> MakeInputs:
    """A maker of normal tensors whose shapes follow from that of the benchmark."""
    return lambda s, dtype, device: {name: torch.randn(*size, dtype=dtype, device=device)
                                     for name, size in shapes(s).items()}
