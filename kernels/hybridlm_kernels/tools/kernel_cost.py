"""Estimates the cost of Triton kernels on an H200 without one: bytes and products executed, cycles modelled.

`python -m hybridlm_kernels.tools.kernel_cost [LABEL ...] [--shape 'B1 T1024 H1 D128'] [--grid 'B1 T8192 H96 D128']`

takes the cases of the benchmark by their labels ("KDA", "GDN", ...; all that Triton computes by default). It runs
each at a small shape in Triton's interpreter and counts (`executed_work.py`), compiles the kernels of the same
launches for sm_90 and models the cycles of their machine code (`cycle_model.py`). Both are done in the configuration
that an untuned run takes at the shape of `--grid`. Times are those of the grids that the call has there, with the
cycles of programs modelled for its number of tokens.

On a CUDA device `--measure` times the same launches, untuned, beside the model: what the model should be corrected by.

With `--passes` the launches of a pass are added up, one line per case and pass, as a Markdown table.

Of attention, work per token grows with the length: give `--shape` and `--grid` the same T. Its cases say how often
loops run whose ends are data (`LoopTrips` in `cases.py`), on average over programs.

With `--all` every configuration of every tuned kernel is compiled and modelled, and the exit code is 1 where the one
that runs untuned takes more than 1.2 times the cycles of the best that does not spill.

Nothing here is measured: see `cycle_model.py` for what the model was compared with, and its error.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch

from hybridlm_kernels.cases import BenchCase, Shape
from hybridlm_kernels.registry import KernelUnavailable, operations
from hybridlm_kernels.tools.bench import shapes
from hybridlm_kernels.tools.cases import bench_cases
from hybridlm_kernels.tools.cycle_model import H200, KernelCost, cost_of
from hybridlm_kernels.tools.kernel_launches import Launch, launches_of, seconds_of_launches
from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED, full_of, untuned

TARGET = 90
# Tokens of a chunk, by which a scan advances: loops whose end is data are taken to be such loops in kernels whose
# programs are as many for any number of tokens. In others they run once, as those over the levels of pairs do where
# decays are weak.
CHUNK_TOKENS = 64
MAX_PROGRAM_KINDS = 2  # of programs along the last axis of a grid, where there are no more than so many
COUNTED_SHAPE, TIMED_SHAPE = "B1 T512 H1 D128", "B1 T8192 H96 D128"
WORSE_THAN_BEST = 1.2  # untuned configurations may take so many times the cycles of the best


@dataclass(frozen=True)
class Row:
    """One launch of a case. Figures of work are per token and head; None where they were not counted."""

    case: str
    part: str
    kernel: str
    configuration: str
    registers: int
    spilled: int
    shared: int
    blocks: int
    instructions: int  # of the code
    cycles: float  # of a full multiprocessor per program, all kinds
    microseconds: float
    chunk_cycles: float  # of a full multiprocessor per chunk and head
    requested: float | None = None
    unique: float | None = None
    kiloflops: float | None = None
    measured: float | None = None  # microseconds


@dataclass(frozen=True)
class PassCost:
    """The launches of one pass of a case, added up. Figures of work are per token and head."""

    case: str
    part: str
    kernels: tuple[str, ...]
    registers: tuple[int, ...]
    spilled: tuple[int, ...]
    blocks: tuple[int, ...]
    requested: float
    unique: float
    torch_bytes: float  # of torch's own operations between launches
    kiloflops: float
    chunk_cycles: float  # of a full multiprocessor per chunk and head
    milliseconds: float


class _Loops(NamedTuple):
    """The trips of a launch's loops whose ends are data, one number or one per loop; and `LoopTrips.busy`."""

    trips: int | Sequence[int]
    busy: float = 1.0


def _same_loops(loops: _Loops, configured: Launch) -> _Loops:
    return loops


def triton_cases(labels: Sequence[str] = ()) -> list[BenchCase]:
    """The cases of the benchmark that a Triton backend computes, all or those of some labels.

    Raises:
        KernelUnavailable: there is no such case.
    """
    known = {op.name for op in operations() if any(backend.name == "triton" for backend in op.backends)}
    cases = [case for case in bench_cases() if case.operation in known and case.one_head_stands_for_all]
    for label in labels:
        if label not in {case.label for case in cases}:
            raise KernelUnavailable(f"no case {label!r} with Triton kernels; there are "
                                    f"{', '.join(case.label for case in cases)}")
    return [case for case in cases if not labels or case.label in labels]


def configurations_of(launch: Launch, times: int) -> list[tuple[str, Launch]]:
    """The launch with each configuration of its kernel's tuning, named, in the order in which untuned runs try them.

    Args:
        launch: the launch.
        times: how often its programs are launched at the shape of interest.
    """
    tuner = _tuners().get(launch.kernel)
    if tuner is None:
        return [("", launch)]
    found: list[tuple[str, Launch]] = []
    for config in tuner.configs:
        blocks = {name: value for name, value in config.kwargs.items() if name in launch.constants}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        name = " ".join(f"{key}={value}" for key, value in (blocks | options).items())
        configured = replace(launch, constants={**launch.constants, **blocks}, options=options,
                             grid=launch.grid_with(blocks))
        if config is tuner.many and full_of(configured.programs * times, H200.multiprocessors):
            found.insert(0, (name, configured))
        else:
            found.append((name, configured))
    return found


@functools.cache
def _tuners() -> dict[Any, Any]:
    """The tuner of every kernel that has one."""
    from hybridlm_kernels.tools.compile_check import compile_cases

    tuned = (case.kernel for _, case in compile_cases(head_dims=None) if hasattr(case.kernel, "configs"))
    return {kernel.fn: kernel for kernel in tuned}


def compile_launch(launch: Launch, trips: int | Sequence[int]) -> KernelCost:
    """The modelled cost of a launch's kernel, whose loops with data as their ends run so often."""
    import triton
    from triton.backends.compiler import GPUTarget

    built = triton.compile(launch.source, target=GPUTarget("cuda", TARGET, 32), options=dict(launch.options))
    kinds = launch.grid[-1] if len(launch.grid) == 3 and launch.grid[-1] <= MAX_PROGRAM_KINDS else 1
    return cost_of(built.asm["cubin"], built.metadata.shared, launch.options["num_warps"],
                   data_trips=trips, kinds=kinds)


def rows_of(case: BenchCase, shape: Shape, every: bool = False) -> Iterator[Row]:
    """The modelled launches of a case at a shape, in the configuration of an untuned run or in all of them.

    Raises:
        ValueError: the code of a kernel has other loops than those whose trips the case says.
    """
    for launch, times, loops_of in _timed_launches(case, shape):
        costs = ((name, round(configured.programs * times * loops.busy), compile_launch(configured, loops.trips))
                 for name, configured in configurations_of(launch, times) for loops in [loops_of(configured)])
        for name, programs, cost in costs if every else [_usable(costs)]:
            cycles = cost.multiprocessor_cycles()
            per_chunk = cycles * programs / len(cost.programs) / (shape.tokens * shape.H / CHUNK_TOKENS)
            yield Row(case.label, launch.part, launch.name, name, cost.registers, cost.spilled, cost.shared,
                      cost.blocks(), cost.code_length, cycles, 1e6 * cost.seconds((programs,)), per_chunk)


def _timed_launches(case: BenchCase, shape: Shape
                    ) -> Iterator[tuple[Launch, int, Callable[[Launch], _Loops]]]:
    """The launches of a case; how often their programs are launched at the shape; and the trips of their loops."""
    if case.loop_trips is not None:
        said = case.loop_trips

        def loops_of(configured: Launch) -> _Loops:
            trips, busy = said(shape, configured.name, configured.constants)
            return _Loops([round(times) for times in trips], busy)

        for launch in launches_of(case, replace(shape, B=1, H=1)):
            yield launch, shape.B * shape.H, loops_of
        return
    # Grids of two small shapes, where inputs cost nothing, say which launches have more programs for more tokens.
    small = replace(shape, B=1, T=CHUNK_TOKENS, H=1)
    for launch, longer in zip(launches_of(case, small), launches_of(case, replace(small, T=2 * small.T)), strict=True):
        scans = launch.programs == longer.programs
        chunks = 1 if scans else math.ceil(shape.T / CHUNK_TOKENS)
        loops = _Loops(math.ceil(shape.T / CHUNK_TOKENS) if scans else 1)
        yield launch, shape.B * shape.H * chunks, functools.partial(_same_loops, loops)


def _usable(costs: Iterator[tuple[str, int, KernelCost]]) -> tuple[str, int, KernelCost]:
    """The first configuration that spills nothing, else the first of all."""
    first = next(costs)
    return next((each for each in chain([first], costs) if not each[2].spilled), first)


def with_work(rows: Sequence[Row], work: Sequence[Mapping[str, Any]], elements: int) -> list[Row]:
    """The rows of a case with what the interpreter counted of the same launches, per token and head."""
    return [replace(row, requested=counted["requested"] / elements, unique=counted["unique"] / elements,
                    kiloflops=counted["product_flops"] / elements / 1e3)
            for row, counted in zip(rows, work, strict=True)]


def with_times(rows: Sequence[Row], times: Sequence[tuple[str, float]]) -> list[Row]:
    """The rows of a case with the measured seconds of the same launches.

    Raises:
        RuntimeError: the device makes other launches, as it does where few heads make it cut documents into segments.
    """
    expected, got = [row.kernel for row in rows], [name for name, _ in times]
    if expected != got:
        raise RuntimeError(f"{rows[0].case}: launches {', '.join(got)} where the model has {', '.join(expected)}; "
                           f"take a shape with more rows or heads")
    return [replace(row, measured=1e6 * seconds) for row, (_, seconds) in zip(rows, times, strict=True)]


def too_slow(rows: Sequence[Row]) -> list[str]:
    """Kernels whose untuned configuration takes much more than the best that does not spill, a line each."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.part, row.kernel), []).append(row)
    found = []
    for (case, part, kernel), group in groups.items():
        best = min((row for row in group if not row.spilled), key=lambda row: row.microseconds, default=group[0])
        if group[0].microseconds > WORSE_THAN_BEST * best.microseconds:
            found.append(f"{case} {part} {kernel}: the untuned configuration ({group[0].configuration}) takes "
                         f"{group[0].microseconds / best.microseconds:.1f} times the time of {best.configuration}")
    return found


def pass_costs(rows: Sequence[Row], torch_bytes: Mapping[str, float], torch_operations: Mapping[str, int],
               elements: int) -> list[PassCost]:
    """The counted rows of a case, added up by pass.

    A launch takes as long as its cycles, what it touches from memory or what it requests from the L2 cache, whichever
    is longest, and an operation of torch as long as its bytes.

    Args:
        rows: the launches of one case, with what was counted.
        torch_bytes: bytes of torch's own operations per token and head, by pass.
        torch_operations: their number.
        elements: tokens times heads that the times are for.
    """
    def cost_of_pass(part: str) -> PassCost:
        launches = [row for row in rows if row.part == part]

        def values(name: str) -> tuple[Any, ...]:
            return tuple(getattr(row, name) for row in launches)

        traffic = [1e6 * (elements * max(unique / H200.bytes_per_second, requested / H200.l2_bytes_per_second)
                          + H200.launch_seconds)
                   for unique, requested in zip(values("unique"), values("requested"), strict=True)]
        of_torch = 1e6 * (elements * torch_bytes[part] / H200.bytes_per_second
                          + torch_operations[part] * H200.launch_seconds)
        return PassCost(
            rows[0].case, part, values("kernel"), values("registers"), values("spilled"), values("blocks"),
            sum(values("requested")), sum(values("unique")), torch_bytes[part], sum(values("kiloflops")),
            sum(values("chunk_cycles")), (of_torch + sum(map(max, values("microseconds"), traffic))) / 1e3)

    return [cost_of_pass(part) for part in dict.fromkeys(row.part for row in rows)]


def pass_table(costs: Sequence[PassCost]) -> str:
    """The costs of passes as a Markdown table."""
    head = ("case, pass", "launches", "requested B", "unique B (+ torch)", "kFLOP", "registers", "blocks",
            "cycles per chunk", "ms")
    lines = [head, ("---",) * len(head)]
    for cost in costs:
        unique = f"{cost.unique:.0f}" + (f" (+{cost.torch_bytes:.0f})" if cost.torch_bytes else "")
        registers = ", ".join(f"{used}" + (f" ({spilled} B spilled)" if spilled else "")
                              for used, spilled in zip(cost.registers, cost.spilled, strict=True))
        lines.append((f"{cost.case} {cost.part}", str(len(cost.kernels)), f"{cost.requested:.0f}", unique,
                      f"{cost.kiloflops:.0f}", registers, ", ".join(map(str, cost.blocks)),
                      f"{cost.chunk_cycles:,.0f}", f"{cost.milliseconds:.2f}"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def count_in_interpreter(labels: Sequence[str], shape: str, tiles: str = "{}") -> dict[str, Any]:
    """Count the work of cases, by their labels, in a process of its own whose kernels are interpreted.

    Args:
        labels: of the cases.
        shape: what is run.
        tiles: see `--tiles`.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "hybridlm_kernels.tools.kernel_cost", *labels, "--shape", shape, "--count",
               "--tiles", tiles]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    if done.returncode:
        raise RuntimeError(f"counting failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def tiles_of(rows: Sequence[Row]) -> str:
    """The tile sizes of modelled launches, as `--tiles` takes them."""
    sizes = {row.kernel: dict(word.split("=") for word in row.configuration.split() if not word.startswith("num_"))
             for row in rows}
    return json.dumps({kernel: {name: int(size) for name, size in of_kernel.items()}
                       for kernel, of_kernel in sizes.items() if of_kernel})


def counts(cases: Sequence[BenchCase], shape: Shape, tiles: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Count in this process, whose kernels are interpreted: launches, operations of torch and the error, by case.

    Args:
        cases: what is run.
        shape: at which shape.
        tiles: constants of kernels by name, in place of those of their first configuration.
    """
    import triton

    from hybridlm_kernels.tools.executed_work import count_work

    for tuner in _tuners().values():
        if tuner.fn.fn.__name__ in tiles:
            tuner.configs = [triton.Config(dict(tiles[tuner.fn.fn.__name__]))]
    found: dict[str, Any] = {}
    for case in cases:
        work = count_work(case, shape)
        found[case.label] = {
            "launches": [asdict(launch) | {"requested": launch.requested, "unique": launch.unique}
                         for launch in work.launches],
            "torch_bytes": work.torch_bytes, "torch_operations": work.torch_operations, "error": work.error}
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ("case", "pass", "kernel", "configuration", "requested B", "unique B", "kFLOP", "registers", "spilled",
            "blocks", "code", "cycles", "us", "measured us", "measured / model")
    cells = [head, *((r.case, r.part, r.kernel, r.configuration, _number(r.requested), _number(r.unique),
                      _number(r.kiloflops), str(r.registers), str(r.spilled), str(r.blocks), str(r.instructions),
                      f"{r.cycles:.0f}", f"{r.microseconds:.0f}", _number(r.measured),
                      "" if r.measured is None else f"{r.measured / r.microseconds:.2f}") for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in
                               enumerate(zip(row, widths, strict=True))).rstrip() for row in cells)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hybridlm_kernels.tools.kernel_cost", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="*", metavar="LABEL", help="cases of the benchmark; all by default")
    parser.add_argument("--shape", default=COUNTED_SHAPE, help=f"what the interpreter runs ({COUNTED_SHAPE})")
    parser.add_argument("--grid", default=TIMED_SHAPE, help=f"what times are modelled for ({TIMED_SHAPE})")
    parser.add_argument("--count", action="store_true", help="count alone, in the interpreter")
    parser.add_argument("--model", action="store_true", help="model cycles alone, without counting")
    parser.add_argument("--measure", action="store_true", help="model cycles, and time the launches on this GPU")
    parser.add_argument("--passes", action="store_true", help="add up the launches of a pass: a Markdown table")
    parser.add_argument("--all", action="store_true", help="model every configuration, and judge the untuned ones")
    parser.add_argument("--tiles", type=json.loads, default={}, metavar="JSON",
                        help="with --count: sizes of tiles by kernel, {\"scan_kernel\": {\"BV\": 64}}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not INSTALLED:
        print("kernel cost: triton is not installed (pip install triton)", file=sys.stderr)
        return 2
    try:
        cases = triton_cases(options.labels)
        counted, timed = shapes([options.shape, options.grid], "cpu")
    except KernelUnavailable as problem:
        print(f"kernel cost: {problem}", file=sys.stderr)
        return 2
    if options.measure and not torch.cuda.is_available():
        print("kernel cost: --measure needs a CUDA device", file=sys.stderr)
        return 2
    if options.passes and (options.count or options.model or options.measure or options.all):
        print("kernel cost: --passes adds up what is counted and modelled: leave out --count, --model, --measure and "
              "--all", file=sys.stderr)
        return 2
    labels = [case.label for case in cases]
    if options.count:
        found = (counts(cases, counted, options.tiles) if INTERPRETED
                 else count_in_interpreter(labels, options.shape, json.dumps(options.tiles)))
        print(json.dumps(found, indent=1))
        return 0
    if INTERPRETED:
        print("kernel cost: unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    rows, passes = [], []
    with untuned() if options.measure else nullcontext():
        for case in cases:
            modelled = list(rows_of(case, timed, options.all))
            if options.measure:
                modelled = with_times(modelled, seconds_of_launches(case, timed))
            elif not options.model and not options.all:
                work = count_in_interpreter([case.label], options.shape, tiles_of(modelled))[case.label]
                elements = counted.tokens * counted.H
                modelled = with_work(modelled, work["launches"], elements)
                of_torch = {part: size / elements for part, size in work["torch_bytes"].items()}
                passes += pass_costs(modelled, of_torch, work["torch_operations"], timed.tokens * timed.H)
            rows += modelled
    slow = too_slow(rows) if options.all else []
    shown: list[Any] = passes if options.passes else rows
    as_text = pass_table(passes) if options.passes else table(rows)
    print(json.dumps([asdict(row) for row in shown], indent=1) if options.json else as_text)
    for line in slow:
        print(line, file=sys.stderr)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
