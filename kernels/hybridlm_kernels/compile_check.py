"""Compiles every Triton kernel for GPUs that need not be there, and prints registers, spills and shared memory.

`python -m hybridlm_kernels.compile_check [operation ...] [--targets sm_90 sm_100] [--json]` exits 1 when a kernel
does not compile, spills registers, or needs more shared memory than the GPU has. Kernels are taken from `SPECIMENS`
of the modules named `triton*` of every operation.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hybridlm_kernels

from .triton_support import INSTALLED, INTERPRETED, Specimen

SHARED_BYTES = 227 * 1024  # a block's share on Hopper and Blackwell
TARGETS = ("sm_90", "sm_100")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target: registers and spilled bytes a thread, shared bytes a block; `problem` if it failed."""

    operation: str
    label: str
    target: str
    num_warps: int
    registers: int
    spilled: int
    shared: int
    seconds: float
    problem: str = ""


def specimens(only: Sequence[str] = ()) -> Iterator[tuple[str, Specimen]]:
    """(operation, specimen) of every Triton module."""
    for package in pkgutil.iter_modules(hybridlm_kernels.__path__):
        if not package.ispkg or (only and package.name not in only):
            continue
        folder = importlib.import_module(f"hybridlm_kernels.{package.name}")
        for module in pkgutil.iter_modules(folder.__path__):
            if module.name.startswith("triton"):
                found = importlib.import_module(f"{folder.__name__}.{module.name}")
                yield from ((package.name, specimen) for specimen in getattr(found, "SPECIMENS", ()))


def compile_for(operation: str, specimen: Specimen, target: str) -> Compiled:
    """Build one specimen to a cubin and read what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, options = specimen.kernel, dict(specimen.constants), {
        "num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):  # autotune and heuristics wrap the kernel
        if hasattr(kernel, "configs"):
            first = kernel.configs[0]
            constants = first.kwargs | constants
            options = {"num_warps": first.num_warps, "num_stages": first.num_stages}
        kernel = kernel.fn
    names = list(kernel.arg_names)
    signature = {name: specimen.types.get(name, "constexpr") for name in names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in specimen.divisible]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    start = time.perf_counter()
    source = ASTSource(fn=kernel, signature=signature, attrs=attributes,
                       constexprs={(names.index(name),): value for name, value in constants.items()})
    try:
        built = triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)
        registers, spilled = _usage(built.asm["cubin"])
    except Exception as error:  # a compiler can fail in any way; the row says how
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Compiled(operation, specimen.label, target, options["num_warps"], 0, 0, 0,
                        time.perf_counter() - start, f"does not compile: {line}")
    shared = built.metadata.shared
    problem = f"spills {spilled} bytes a thread" if spilled else ""
    if shared > SHARED_BYTES:
        problem = f"needs {shared} bytes of shared memory, {SHARED_BYTES} are there"
    return Compiled(operation, specimen.label, target, options["num_warps"], registers, spilled, shared,
                    time.perf_counter() - start, problem)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (where spilled registers go) a thread."""
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
    head = ("operation", "kernel", "target", "warps", "registers", "spilled", "shared", "seconds", "")
    cells = [head, *((r.operation, r.label, r.target, str(r.num_warps), str(r.registers), str(r.spilled),
                      str(r.shared), f"{r.seconds:.1f}", r.problem or "ok") for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hybridlm_kernels.compile_check", description=__doc__)
    parser.add_argument("operations", nargs="*", help="folders to check; all by default")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="sm_NN")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    if not INSTALLED or INTERPRETED:
        print("compile check: " + ("unset TRITON_INTERPRET: interpreted kernels cannot be compiled" if INTERPRETED
                                   else "triton is not installed (pip install triton)"), file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    todo = [(*found, target) for found in specimens(chosen.operations) for target in chosen.targets]
    if not todo:
        print(f"compile check: no Triton kernels in {', '.join(chosen.operations) or 'any operation'}", file=sys.stderr)
        return 2
    rows: list[Any] = []
    for i, (operation, specimen, target) in enumerate(todo):
        if sys.stderr.isatty():
            print(f"\r{i + 1}/{len(todo)} {operation} {specimen.label} {target}\033[K", end="", file=sys.stderr)
        rows.append(compile_for(operation, specimen, target))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(json.dumps([asdict(row) for row in rows], indent=1) if chosen.json else table(rows))
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
