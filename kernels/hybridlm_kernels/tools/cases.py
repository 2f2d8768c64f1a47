"""The cases of all operations, and the shapes at which the benchmark runs them."""

from __future__ import annotations

import importlib
import pkgutil

from hybridlm_kernels import ops
from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases, Shape

# The six that projects quote for linear attention.
COMMON_SHAPES = (Shape(1, 8192, 96, 128), Shape(2, 16384, 16, 128), Shape(4, 2048, 16, 128),
                 Shape(4, 4096, 64, 128), Shape(8, 2048, 32, 256), Shape(8, 1024, 8, 64))
# The same head dims with fewer heads and tokens: what a CPU can do while one waits.
SMALL_SHAPES = tuple(dict.fromkeys(Shape(1, max(256, s.T // 16), max(2, s.H // 16), s.D) for s in COMMON_SHAPES))



def operation_cases() -> list[OperationCases]:
    """The checks and the benchmarks of every operation; checks are small enough for a few seconds on a CPU."""
    found = []
    for package in pkgutil.iter_modules(ops.__path__):
        if package.ispkg:
            found += importlib.import_module(f"{ops.__name__}.{package.name}.cases").CASES
    return found


def check_cases() -> list[CheckCase]:
    """Every call that is checked against the reference, by operation."""
    return [case for checks, _ in operation_cases() for case in checks]


def bench_cases() -> list[BenchCase]:
    """Every call that is timed, in the order of the table."""
    return [case for _, benchmarks in operation_cases() for case in benchmarks]
