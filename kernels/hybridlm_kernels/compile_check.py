"""Compiles every Triton kernel for GPUs that need not be there, and prints registers, spills and shared memory.

`python -m hybridlm_kernels.compile_check [operation ...] [--targets sm_90 sm_100] [--all] [--json]` exits 1 when a
kernel does not compile, spills registers, or needs more shared memory than the GPU has. Kernels are taken from
`SPECIMENS` of the modules named `triton*` of every operation. Each is built as its first configuration has it; with
`--all` as every configuration that tuning may choose, which takes several times as long. What was built once comes from
Triton's cache.
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
    configuration: str
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


@dataclass(frozen=True)
class Configured:
    """A specimen as one of the configurations of its tuning has it: constants, and the compiler's options."""

    specimen: Specimen
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def source(self) -> Any:
        """What triton compiles."""
        from triton.compiler import ASTSource

        kernel = _untuned(self.specimen.kernel)
        names = list(kernel.arg_names)
        signature = {name: self.specimen.types.get(name, "constexpr") for name in names}
        aligned = [name for name, kind in signature.items()
                   if kind.startswith("*") or name in self.specimen.divisible]
        return ASTSource(fn=kernel, signature=signature,
                         attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
                         constexprs={(names.index(name),): value for name, value in self.constants.items()})

    def __str__(self) -> str:
        chosen = {name: value for name, value in self.constants.items() if name not in self.specimen.constants}
        return " ".join(f"{name}={value}" for name, value in (chosen | self.options).items())


def _untuned(kernel: Any) -> Any:
    while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):  # autotune and heuristics wrap the kernel
        kernel = kernel.fn
    return kernel


def configurations(specimen: Specimen) -> list[Configured]:
    """Those that tuning may choose, the default first."""
    found = getattr(specimen.kernel, "configs", None)
    if not found:
        return [Configured(specimen, dict(specimen.constants),
                           {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages})]
    return [Configured(specimen, config.kwargs | dict(specimen.constants),
                       {"num_warps": config.num_warps, "num_stages": config.num_stages}) for config in found]


def compile_for(operation: str, configured: Configured, target: str) -> Compiled:
    """Build one specimen to a cubin and read what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget

    start = time.perf_counter()
    registers = spilled = shared = 0
    try:
        built = triton.compile(configured.source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
                               options=configured.options)
        registers, spilled = _usage(built.asm["cubin"])
        shared = built.metadata.shared
        problem = f"spills {spilled} bytes a thread" if spilled else ""
        if shared > SHARED_BYTES:
            problem = f"needs {shared} bytes of shared memory, {SHARED_BYTES} are there"
    except Exception as error:  # a compiler can fail in any way; the row says how
        problem = "does not compile: " + (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return Compiled(operation, configured.specimen.label, str(configured), target, configured.options["num_warps"],
                    registers, spilled, shared, time.perf_counter() - start, problem)


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
    head = ("operation", "kernel", "configuration", "target", "registers", "spilled", "shared", "seconds", "")
    cells = [head, *((r.operation, r.label, r.configuration, r.target, str(r.registers), str(r.spilled),
                      str(r.shared), f"{r.seconds:.1f}", r.problem or "ok") for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hybridlm_kernels.compile_check", description=__doc__)
    parser.add_argument("operations", nargs="*", help="folders to check; all by default")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="sm_NN")
    parser.add_argument("--all", action="store_true", help="every configuration of a kernel, not the default alone")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    if not INSTALLED or INTERPRETED:
        print("compile check: " + ("unset TRITON_INTERPRET: interpreted kernels cannot be compiled" if INTERPRETED
                                   else "triton is not installed (pip install triton)"), file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    todo = [(operation, configured, target) for operation, specimen in specimens(chosen.operations)
            for configured in configurations(specimen)[:None if chosen.all else 1] for target in chosen.targets]
    if not todo:
        print(f"compile check: no Triton kernels in {', '.join(chosen.operations) or 'any operation'}", file=sys.stderr)
        return 2
    rows: list[Any] = []
    for i, (operation, configured, target) in enumerate(todo):
        if sys.stderr.isatty():
            print(f"\r{i + 1}/{len(todo)} {operation} {configured.specimen.label} {target}\033[K", end="",
                  file=sys.stderr)
        rows.append(compile_for(operation, configured, target))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(json.dumps([asdict(row) for row in rows], indent=1) if chosen.json else table(rows))
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
