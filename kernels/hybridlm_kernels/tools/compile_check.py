"""Compiles every Triton kernel for GPUs that need not be there, and prints registers, spills and shared memory.

`python -m hybridlm_kernels.tools.compile_check [operation ...] [--targets sm_90 sm_100] [--all] [--jobs N] [--json]`
exits 1 when a kernel does not compile, spills registers, or needs more shared memory than the GPU has. Kernels are
taken from `COMPILE_CASES` of the modules named `triton*` of every operation, for heads of 64 and 128, each in the first
of its configurations that can be launched and spills nothing, which untuned runs take (`triton_support.first_usable`).

With `--all` every configuration is built, for heads of 32 and 256 too, which takes several times as long. Those that
tuning leaves out (`triton_support.worth_timing`) are marked so; it is an error when a kernel has none left, or when one
is left out of everything it was built for, so that nobody can use it. Kernels for heads of 256 may spill. What was
built once comes from Triton's cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hybridlm_kernels import ops
from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED, CompileCase, worth_timing

# Kilobytes of shared memory that a block can have.
SHARED_KB = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227,
             "sm_120": 99}
MAX_TENSOR_COLUMNS = 512  # columns of Blackwell's tensor memory
TARGETS = ("sm_90", "sm_100")
DEFAULT_HEAD_DIMS = (0, 64, 128)  # 0 stands for kernels that have none
MAX_UNSPILLED_HEAD_DIM = 128  # kernels for larger heads may spill
BuildArguments = tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...], bool]  # arguments of `builds`


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target: registers and spilled bytes per thread, shared bytes per block; `problem` if it failed.

    `spilled` is None where the kernel does not compile or cannot be launched.
    """

    operation: str
    kernel: str
    label: str
    head_dim: int
    configuration: str
    target: str
    num_warps: int
    registers: int
    spilled: int | None
    shared: int
    seconds: float
    problem: str = ""
    left_out: bool = False  # of tuning, as it should be: no failure


def compile_cases(only: Sequence[str] = (),
                  head_dims: Sequence[int] | None = DEFAULT_HEAD_DIMS) -> Iterator[tuple[str, CompileCase]]:
    """Yields (operation, compile_case) of every Triton module, of some head dims or all."""
    for package in pkgutil.iter_modules(ops.__path__):
        if not package.ispkg or (only and package.name not in only):
            continue
        folder = importlib.import_module(f"hybridlm_kernels.ops.{package.name}")
        for module in pkgutil.iter_modules(folder.__path__):
            if module.name.startswith("triton"):
                found = importlib.import_module(f"{folder.__name__}.{module.name}")
                yield from ((package.name, compile_case) for compile_case in getattr(found, "COMPILE_CASES", ())
                            if head_dims is None or compile_case.head_dim in head_dims)


@dataclass(frozen=True)
class Configured:
    """A compile_case as one of the configurations of its tuning has it: constants, and the compiler's options."""

    compile_case: CompileCase
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def source(self) -> Any:
        """The kernel with its signature and constants, as triton compiles it."""
        from triton.compiler import ASTSource

        kernel = _untuned(self.compile_case.kernel)
        names = list(kernel.arg_names)
        signature = {name: self.compile_case.types.get(name, "constexpr") for name in names}
        aligned = [name for name, kind in signature.items()
                   if kind.startswith("*") or name in self.compile_case.divisible]
        return ASTSource(fn=kernel, signature=signature,
                         attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
                         constexprs={(names.index(name),): value for name, value in self.constants.items()})

    def __str__(self) -> str:
        chosen = {name: value for name, value in self.constants.items() if name not in self.compile_case.constants}
        return " ".join(f"{name}={value}" for name, value in (chosen | self.options).items())


def _untuned(kernel: Any) -> Any:
    """The kernel below the decorators that tune it."""
    while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):  # autotune and heuristics wrap the kernel
        kernel = kernel.fn
    return kernel


def configurations(compile_case: CompileCase) -> list[Configured]:
    """The configurations that tuning may choose, the default first."""
    found = getattr(compile_case.kernel, "configs", None)
    if not found:
        return [Configured(compile_case, dict(compile_case.constants),
                           {"num_warps": compile_case.num_warps, "num_stages": compile_case.num_stages})]
    return [Configured(compile_case, config.kwargs | dict(compile_case.constants),
                       {"num_warps": config.num_warps, "num_stages": config.num_stages}) for config in found]


def compile_for(operation: str, configured: Configured, target: str) -> Compiled:
    """Builds one compile_case to a cubin and reads what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget

    start, compile_case = time.perf_counter(), configured.compile_case
    registers = shared = 0
    spilled, problem = None, ""
    try:
        built = triton.compile(configured.source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
                               options=configured.options)
        registers, stack = _usage(built.asm["cubin"])
        shared = built.metadata.shared
        tensor_columns = getattr(built.metadata, "tmem_size", None) or 0
        if shared > SHARED_KB[target] * 1024:
            problem = f"needs {shared} bytes of shared memory, {SHARED_KB[target] * 1024} are there"
        elif tensor_columns > MAX_TENSOR_COLUMNS:
            problem = f"needs {tensor_columns} columns of tensor memory, {MAX_TENSOR_COLUMNS} are there"
        else:
            spilled = stack
            if spilled and compile_case.head_dim <= MAX_UNSPILLED_HEAD_DIM:
                problem = f"spills {spilled} bytes per thread"
    except Exception as error:  # a compiler can fail in any way; the row says how
        problem = "does not compile: " + (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return Compiled(operation, _untuned(compile_case.kernel).__name__, compile_case.label, compile_case.head_dim,
                    str(configured), target, configured.options["num_warps"], registers, spilled, shared,
                    time.perf_counter() - start, problem)


def judge_configurations(rows: Sequence[Compiled]) -> list[Compiled]:
    """Marks the rows of configurations that tuning leaves out, and fails those that it leaves out everywhere."""
    groups: dict[tuple[str, str, str], list[Compiled]] = defaultdict(list)
    for row in rows:
        groups[row.operation, row.label, row.target].append(row)
    kept = {row for group in groups.values() for row in worth_timing(group, [row.spilled for row in group])}
    of_use = {(row.operation, row.kernel, row.configuration) for row in kept}

    def judge(row: Compiled) -> Compiled:
        if row in kept:
            return row
        if (row.operation, row.kernel, row.configuration) not in of_use:
            return replace(row, problem=f"never chosen: {row.problem or 'others do not spill'}")
        return replace(row, left_out=True)

    return [judge(row) for row in rows]


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (where spilled registers go) per thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {text.strip()[:200]}")
    return int(found[1]), int(found[2])


def table(rows: Sequence[Compiled]) -> str:
    """The rows as text."""
    head = ("operation", "kernel", "configuration", "target", "registers", "spilled", "shared", "seconds", "")
    cells = [head, *((r.operation, r.label, r.configuration, r.target, str(r.registers),
                      "-" if r.spilled is None else str(r.spilled), str(r.shared), f"{r.seconds:.1f}",
                      "left out" if r.left_out else r.problem or "ok") for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


@lru_cache(maxsize=1)
def builds(operations: tuple[str, ...], targets: tuple[str, ...], head_dims: tuple[int, ...],
           every: bool) -> list[tuple[str, list[Configured], str]]:
    """The rows to make: operation, configurations of a kernel of which the first usable one is wanted, and target.

    With `every` each configuration has a row of its own, for all head dims; else a kernel has one, for `head_dims`.
    """
    return [(operation, wanted, target)
            for operation, compile_case in compile_cases(operations, None if every else head_dims)
            for wanted in ([[each] for each in configurations(compile_case)] if every
                           else [configurations(compile_case)]) for target in targets]


def compile_usable(operation: str, wanted: Sequence[Configured], target: str) -> Compiled:
    """The first of some configurations that has no problem, else the first of all with its problem."""
    found = []
    for configured in wanted:
        found.append(compile_for(operation, configured, target))
        if not found[-1].problem:
            return found[-1]
    return found[0]


def _build(chosen: BuildArguments, number: int) -> Compiled:
    return compile_usable(*builds(*chosen)[number])


def _build_all(chosen: BuildArguments, jobs: int) -> list[Compiled]:
    """All builds, by so many processes, with progress on a terminal."""
    rows, count = [], len(builds(*chosen))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        for row in (pool.map if pool else map)(partial(_build, chosen), range(count)):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{len(rows)}/{count} {row.operation} {row.label} {row.target}\033[K", end="",
                      file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hybridlm_kernels.tools.compile_check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", help="folders to check; all by default")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(SHARED_KB), metavar="sm_NN")
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(DEFAULT_HEAD_DIMS), metavar="D",
                        help="head dims to build for; 0 stands for kernels that have none")
    parser.add_argument("--all", action="store_true", help="every configuration of a kernel, not one alone")
    parser.add_argument("--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))),
                        help="processes that compile; one per core by default, 8 at most")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not INSTALLED or INTERPRETED:
        print("compile check: " + ("unset TRITON_INTERPRET: interpreted kernels cannot be compiled" if INTERPRETED
                                   else "triton is not installed (pip install triton)"), file=sys.stderr)
        return 2
    chosen = tuple(options.operations), tuple(options.targets), tuple(options.head_dims), options.all
    if not builds(*chosen):
        print(f"compile check: no Triton kernels in {', '.join(options.operations) or 'any operation'}",
              file=sys.stderr)
        return 2
    rows = _build_all(chosen, options.jobs)
    if options.all:
        rows = judge_configurations(rows)
    print(json.dumps([asdict(row) for row in rows], indent=1) if options.json else table(rows))
    return int(any(row.problem and not row.left_out for row in rows))


if __name__ == "__main__":
    sys.exit(main())
