"""Times every backend of every operation side by side: `python -m hybridlm_kernels.tools.bench [operation ...]`.

Forward, and forward with backward, at the shapes of `cases.py`. Bytes are the floor: every input read once and
every output written once (with the backward, their gradients too); FLOPs are those of the mathematics. Both are given
per second and as fractions of what this machine's copy and matrix product reach, measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels import registry
from hybridlm_kernels.cases import BenchCase, Shape
from hybridlm_kernels.tools.cases import COMMON_SHAPES, SMALL_SHAPES, bench_cases
from hybridlm_kernels.triton_support import INTERPRETED

ROUNDS = 5  # readings per backend, taken in turn; the median counts
READING_SECONDS = 0.05  # repetitions of a call fill a reading


@dataclass(frozen=True)
class Machine:
    """A device and its ceilings: `copy`, bytes per second read and written; `matmul`, FLOP/s of a matrix product."""

    device: str
    name: str
    dtype: str
    copy: float
    matmul: float
    threads: int
    torch: str
    triton: str | None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one backend (None: not run), and its rates against the machine's.

    `problem`: why it was not run; `failed`: it should have run.
    """

    operation: str
    label: str
    shape: str
    backend: str
    forward_ms: float | None = None
    both_ms: float | None = None  # forward and backward
    gigabytes: float = 0.0  # floor of bytes of the last column timed
    gigaflops: float = 0.0
    bytes_per_second: float = 0.0
    flops_per_second: float = 0.0
    of_copy: float = 0.0
    of_matmul: float = 0.0
    peak_mib: float | None = None  # allocated by a call beyond what was there before it; counted on CUDA
    problem: str = ""
    failed: bool = False


def machine(device: str, dtype: torch.dtype) -> Machine:
    """Measures the two ceilings, copy and matrix product."""
    cuda = device == "cuda"
    size, side = (2**28, 8192) if cuda else (2**24, 1024)
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    copy = median_seconds({"": lambda: target.copy_(source)}, device)[""]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = median_seconds({"": lambda: a @ b}, device)[""]
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    return Machine(device, name, str(dtype).removeprefix("torch."), 2 * source.nbytes / copy, 2 * side**3 / product,
                   torch.get_num_threads(), torch.__version__, triton_version)


def median_seconds(runs: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Median seconds of one call of each, all in turn, `ROUNDS` times."""
    repeat = {}
    for name, run in runs.items():
        run()  # compiles and tunes
        repeat[name] = max(1, min(100, int(READING_SECONDS / max(_seconds(run, 1, device), 1e-6))))
    readings: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            readings[name].append(_seconds(run, repeat[name], device) / repeat[name])
    return {name: statistics.median(values) for name, values in readings.items()}


def _seconds(run: Callable[[], Any], repeat: int, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeat):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    for _ in range(repeat):
        run()
    return time.perf_counter() - began


def bench(case: BenchCase, shape: Shape, here: Machine, only: Sequence[str] = ()) -> list[Timing]:
    """Times a case at a shape, one row per backend; the row of one that refuses or fails says why."""
    dtype = getattr(torch, here.dtype)
    torch.manual_seed(0)
    inputs = case.make(shape, dtype, here.device)
    trained = [inputs[name].requires_grad_() for name in case.trained if name in inputs]
    upstream = _upstream(case, inputs)
    forwards, both, peaks, rows = {}, {}, {}, []
    for backend in _backends(case.operation, here.device, only):
        forward, backward = _runs(case, backend, inputs, trained, upstream)
        try:
            forward()
            backward()
            peaks[backend] = _peak_mib(backward if case.trained else forward, here.device)
        except Exception as error:  # a kernel can fail in any way, and others are to be timed all the same
            rows.append(_without_time(case, shape, backend, error))
            continue
        forwards[backend] = forward
        if case.trained:
            both[backend] = backward
    forward_seconds = median_seconds(forwards, here.device)
    both_seconds = median_seconds(both, here.device)
    floor = sum(t.nbytes for t in [*inputs.values(), upstream])
    if case.trained:
        floor = 2 * floor + sum(t.nbytes for t in trained)
    flops = case.flops(shape) * (3 if case.trained else 1)
    for name, seconds in forward_seconds.items():
        last = both_seconds.get(name, seconds)
        rows.append(Timing(
            case.operation, case.label, str(shape), name, 1e3 * seconds,
            1e3 * both_seconds[name] if name in both_seconds else None, floor / 1e9, flops / 1e9, floor / last,
            flops / last, floor / last / here.copy, flops / last / here.matmul, peaks[name]))
    return rows


def _without_time(case: BenchCase, shape: Shape, backend: str, error: Exception) -> Timing:
    """The row of a call that could not be timed; it says whether that is a failure."""
    expected = isinstance(error, registry.KernelUnavailable | torch.OutOfMemoryError)
    text = (str(error).strip().splitlines() or [""])[0]
    return Timing(case.operation, case.label, str(shape), backend, failed=not expected,
                  problem=text if expected else f"{type(error).__name__}: {text}")


def _peak_mib(run: Callable[[], Any], device: str) -> float | None:
    """Peak memory of a call in MiB. The call was made before: the first one builds and tunes, which takes memory."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _backends(operation: str, device: str, only: Sequence[str]) -> list[str]:
    """Names of the backends made for the device, without the reference, which is slow, and interpreted kernels."""
    found = next(op for op in registry.operations() if op.name == operation)
    names = [b.name for b in found.backends if not b.devices or device in b.devices]
    return [name for name in names if (name in only if only else name != "reference")
            and not (INTERPRETED and name == "triton")]


def _upstream(case: BenchCase, inputs: dict[str, Tensor]) -> Tensor:
    """A random gradient of the output, from which the size of the output is read, too."""
    with torch.no_grad():
        out = case.run(inputs, None)
    return torch.randn_like(out) if out.is_floating_point() else out


def _runs(case: BenchCase, backend: str, inputs: dict[str, Tensor], trained: list[Tensor], upstream: Tensor
          ) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The forward, and the forward with the backward, as functions without arguments."""

    def forward() -> Any:
        with torch.no_grad():
            return case.run(inputs, backend)

    def both() -> Any:
        return torch.autograd.grad(case.run(inputs, backend), trained, upstream) if trained else None

    return forward, both


def table(rows: Sequence[Timing], here: Machine) -> str:
    """The rows as text, and how much faster each backend is than torch at the same call (and than
    flash-linear-attention, where that ran)."""
    times = {(r.operation, r.label, r.shape, r.backend): r.both_ms or r.forward_ms for r in rows if not r.problem}
    bases = [name for name in ("torch", "fla") if name == "torch" or any(key[3] == name for key in times)]
    cells: list[tuple[str, ...]] = [("operation", "case", "shape", "backend", "fwd ms", "fwd+bwd ms", "peak MiB",
                                     "GB/s", "of copy", "TFLOP/s", "of matmul", *(f"against {name}" for name in bases))]
    for r in rows:
        head = (r.operation, r.label, r.shape)
        if r.problem:
            cells.append((*head, r.backend, r.problem, *[""] * (6 + len(bases))))
            continue
        time = times[*head, r.backend]
        ratios = (other / time if (other := times.get((*head, name))) and time else None for name in bases)
        cells.append((*head, r.backend, f"{r.forward_ms:.3f}", "" if r.both_ms is None else f"{r.both_ms:.3f}",
                      "" if r.peak_mib is None else f"{r.peak_mib:.0f}", f"{r.bytes_per_second / 1e9:.1f}",
                      f"{r.of_copy:.0%}", f"{r.flops_per_second / 1e12:.3f}", f"{r.of_matmul:.0%}",
                      *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)))
    widths = [max(len(row[i]) for row in cells if not (i == 4 and len(row[i]) > 12)) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in cells]
    return "\n".join([describe(here), *(line.rstrip() for line in lines)])


def describe(here: Machine) -> str:
    """The machine in one line."""
    return (f"{here.name}, {here.dtype}, {here.threads} threads, torch {here.torch}, triton {here.triton}: copy "
            f"{here.copy / 1e9:.1f} GB/s, matrix product {here.matmul / 1e12:.2f} TFLOP/s")


def shapes(texts: Sequence[str], device: str) -> list[Shape]:
    """Shapes from texts like "B1 T8192 H96 D128"; the common six by default, and smaller ones on a CPU.

    Raises:
        KernelUnavailable: a text that is no shape.
    """
    found = []
    for text in texts:
        match = re.fullmatch(r"B(\d+)[ ,]?T(\d+)[ ,]?H(\d+)[ ,]?D(\d+)", text.strip())
        if match is None or not all(int(n) for n in match.groups()):
            raise registry.KernelUnavailable(f"{text!r} is no shape; write one like 'B1 T8192 H96 D128'")
        found.append(Shape(*map(int, match.groups())))
    return found or list(COMMON_SHAPES if device == "cuda" else SMALL_SHAPES)


def run(operations: Sequence[str] = (), *, backends: Sequence[str] = (), shape_texts: Sequence[str] = (),
        dtype: str | None = None, device: str | None = None, seconds: float = float("inf"),
        progress: Callable[[str], None] = lambda _: None) -> tuple[Machine, Iterator[Timing]]:
    """Times cases: the machine, and rows as they are measured, every case at a shape before the next shape.

    The dtype is bfloat16 on CUDA and float32 elsewhere, unless `dtype` names one. A case that has not begun after
    `seconds` is left out, and its row says so.

    Raises:
        KernelUnavailable: an operation, backend or shape that does not exist.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    todo = [case for case in bench_cases() if not operations or case.operation in operations]
    known = {case.operation for case in bench_cases()}
    for name in operations:
        if name not in known:
            raise registry.KernelUnavailable(f"no benchmark of {name!r}; there are {', '.join(sorted(known))}")
    names = {b.name for op in registry.operations() for b in op.backends}
    for name in backends:
        if name not in names:
            raise registry.KernelUnavailable(f"no backend {name!r}; there are {', '.join(sorted(names))}")
    sizes = shapes(shape_texts, device)
    progress("measuring copy and matrix product")
    end = time.monotonic() + seconds
    here = machine(device, getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32")))

    def rows() -> Iterator[Timing]:
        for i, (shape, case) in enumerate((shape, case) for shape in sizes for case in todo):
            progress(f"{i + 1}/{len(todo) * len(sizes)} {case.operation} {case.label} {shape}")
            if time.monotonic() > end:
                yield Timing(case.operation, case.label, str(shape), "-", problem="left out: no time was left")
                continue
            try:
                yield from bench(case, shape, here, backends)
            except Exception as error:
                yield _without_time(case, shape, "-", error)
            gc.collect()

    return here, rows()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hybridlm_kernels.tools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return show(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the benchmark to a command line, this one or another around it."""
    parser.add_argument("operations", nargs="*", help="all by default")
    parser.add_argument("--backends", nargs="+", default=[], help="all but the reference by default")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="'B1 T8192 H96 D128'",
                        help="the six common ones by default, smaller ones on a CPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many; no limit")


def show(chosen: argparse.Namespace) -> int:
    """Measures and prints; returns the exit code, 1 where a backend failed at a call it should run, or was interrupted.

    Raises:
        KernelUnavailable: no such operation, backend, shape or device.
    """
    tty = sys.stderr.isatty()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise registry.KernelUnavailable("--device cuda: torch sees no CUDA device here")
    here, found = run(chosen.operations, backends=chosen.backends, shape_texts=chosen.shapes, dtype=chosen.dtype,
                      device=chosen.device, seconds=chosen.seconds,
                      progress=lambda text: print(f"\r{text}\033[K", end="", file=sys.stderr) if tty else None)
    rows, complete = _until_interrupted(found)
    order = [(case.operation, case.label) for case in bench_cases()]
    rows.sort(key=lambda row: order.index((row.operation, row.label)))
    if tty:
        print("\r\033[K", end="", file=sys.stderr)
    replaced = registry.replacements()
    if chosen.json:
        found_rows = [asdict(row) for row in rows]
        print(json.dumps({"machine": asdict(here), "rows": found_rows, "replacements": replaced}, indent=1))
    else:
        print("\n".join([table(rows, here), *(f"replaced in {line}" for line in replaced)]))
    return int(not complete or any(row.failed for row in rows))


def _until_interrupted(found: Iterator[Timing]) -> tuple[list[Timing], bool]:
    """The rows, and whether those are all: an interrupt after minutes must not lose what was measured."""
    rows: list[Timing] = []
    try:
        for row in found:
            rows.append(row)
    except KeyboardInterrupt:
        return rows, False
    return rows, True


if __name__ == "__main__":
    try:
        sys.exit(main())
    except registry.KernelUnavailable as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
