"""Machine code of sm_90 kernels as a list of instructions, with the control bits by which the hardware schedules them.

`nvdisasm`, which comes with triton, prints the code; the upper half of each 128-bit instruction holds in its bits 41
to 57 the cycles to wait before the next instruction, the scoreboards that the instruction sets when its result is
there or its operands are read, and those that it waits for. (Jia et al. 2018, Dissecting the NVIDIA Volta GPU
Architecture via Microbenchmarking, section 2.1; the layout of these bits has not changed since.)
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

NO_SCOREBOARD = 7
_LABEL = re.compile(r"\s*(\.L_\S+):")
_CODE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x([0-9a-f]+) \*/")
_UPPER = re.compile(r"/\* 0x([0-9a-f]+) \*/")
_TARGET = re.compile(r"`\((\.L_\S+?)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name, operands and control bits.

    `predicate` is the register that decides whether it takes effect, "" for none; `negated` turns it round. `target` is
    the index of the instruction to which a branch goes, None for all others.
    """

    name: str  # with its modifiers: "ISETP.GE.U32.AND"
    operands: tuple[str, ...]
    predicate: str
    negated: bool
    stall: int  # cycles before the next instruction of the warp
    write_barrier: int  # scoreboard set when the result is there, NO_SCOREBOARD for none
    read_barrier: int  # scoreboard set when the operands are read
    waits: int  # one bit per scoreboard that must be clear
    target: int | None = None

    @cached_property
    def opcode(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @cached_property
    def modifiers(self) -> frozenset[str]:
        """The modifiers of the name."""
        return frozenset(self.name.split(".")[1:])


def tool(name: str) -> Path:
    """The path of one of the CUDA tools that come with triton, "nvdisasm" or "cuobjdump"."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def run_on_cubin(name: str, options: Sequence[str], cubin: bytes) -> str:
    """Run a tool on a cubin and return its output."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool(name), *options, file.name], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of the kernel in a cubin, in the order of their addresses."""
    return parse(run_on_cubin("nvdisasm", ["-c", "-hex"], cubin))


def parse(text: str) -> list[Instruction]:
    """The instructions in the text that `nvdisasm -c -hex` prints."""
    lines = text.splitlines()
    labels: dict[str, int] = {}
    found: list[tuple[str, int]] = []
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif code := _CODE.match(line):
            upper = _UPPER.search(lines[number + 1])
            assert upper is not None, f"no second half of the instruction {line.strip()}"
            found.append((code[2], int(upper[1], 16)))
    return [_instruction(code, upper, labels) for code, upper in found]


def _instruction(text: str, upper: int, labels: dict[str, int]) -> Instruction:
    predicate, negated = "", False
    if text.startswith("@"):
        condition, text = text.split(None, 1)
        negated = condition.startswith("@!")
        predicate = condition.lstrip("@!")
    name, _, rest = text.partition(" ")
    target = _TARGET.search(rest)
    operands = tuple(part.strip() for part in rest.split(",")) if rest.strip() else ()
    return Instruction(name, operands, predicate, negated,
                       upper >> 41 & 15, upper >> 46 & 7, upper >> 49 & 7, upper >> 52 & 63,
                       labels.get(target[1]) if target and name.startswith(("BRA", "UBRA")) else None)
