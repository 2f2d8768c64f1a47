"""A model of the cycles that compiled sm_90 kernels take, for deciding between versions of a kernel without a GPU.

One warp goes through the machine code in order: it waits as the control bits say (`sass.py`), loads, products and
barriers take the latencies below, and loops run as often as their counters say (`sass_values.py`); a loop whose end
is data, as that over the chunks of a document or over the keys of a query, as often as the caller says. A
multiprocessor with several blocks then takes the longer of the latency of one program and the issue slots and tensor
cores of all of them.

The time of a launch is at least that of what its programs request from the L2 cache. The model knows no other caches,
no bank conflicts and no contention for memory. It was compared with published times of
flash-linear-attention's kernels on an H200: its scan came out at 1882 cycles per chunk where 2100 to 2400 were
measured, whole passes at 0.6 to 1.06 of the published times. So read a result as 1 to 1.6 times itself, and a ratio
between two versions of one kernel as what it is good for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridlm_kernels.tools.sass import NO_SCOREBOARD, Instruction, disassemble, run_on_cubin
from hybridlm_kernels.tools.sass_values import Registers
from hybridlm_kernels.triton_support import resident_blocks

# Cycles from issue to result where the hardware reports it through a scoreboard.
LATENCY = {
    "LDG": 350, "LDGSTS": 12, "STG": 12, "ATOMG": 600, "LDS": 30, "LDSM": 33, "STS": 12, "STSM": 14, "LDL": 35,
    "STL": 12, "LDC": 30, "ULDC": 12, "SHFL": 25, "MUFU": 24, "REDUX": 20, "VOTE": 12, "S2R": 30, "R2UR": 12,
    "I2F": 20, "F2I": 20, "HMMA": 33}
UNKNOWN_LATENCY = 20
OPERANDS_READ = 12  # cycles until the operands of a load or store may be overwritten
BARRIER = 20  # cycles that warps wait for one another
PRODUCT_START, PRODUCT_END = 20, 10  # cycles before and after the tensor cores work on a product of a warp group
THREADS = 32  # of a warp
SHARED_LOAD_BYTES = 4  # loads of up to so many bytes per thread are mostly of numbers that threads share: L1 has them
LONGEST_RUN = 4_000_000  # instructions, beyond which the code is taken not to end


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that the model takes into account."""

    multiprocessors: int
    hertz: float
    registers: int  # of a multiprocessor, 32 bits each
    shared_bytes: int  # of a multiprocessor
    warps: int  # that a multiprocessor holds
    bytes_per_second: float  # of memory
    l2_bytes_per_second: float
    launch_seconds: float


H200 = Device(multiprocessors=132, hertz=1.755e9, registers=65536, shared_bytes=228 * 1024, warps=64,
              bytes_per_second=4.3e12, l2_bytes_per_second=6.0e12, launch_seconds=3.5e-6)


@dataclass(frozen=True)
class ProgramCost:
    """The cost of one program of a kernel: cycles when alone; instructions, cycles of the tensor cores and requested
    bytes per warp.

    `data_loops`: loops whose end the code does not decide.
    """

    cycles: float
    instructions: int
    tensor_cycles: float
    data_loops: int
    requested: int = 0


class _Warp:
    """The clock of one warp that runs alone: scoreboards and the tensor cores' queue."""

    def __init__(self) -> None:
        self.time = 0.0
        self.scoreboards = [0.0] * 6
        self.products_end = 0.0
        self.tensor_cycles = 0.0
        self.instructions = 0
        self.requested = 0

    def issue(self, instruction: Instruction) -> None:
        """Advance by one instruction."""
        for number, ready in enumerate(self.scoreboards):
            if instruction.waits >> number & 1:
                self.time = max(self.time, ready)
        self.instructions += 1
        opcode = instruction.opcode
        latency = float(LATENCY.get(opcode, UNKNOWN_LATENCY))
        if opcode == "HGMMA":
            busy = tensor_cycles(instruction.name)
            self.tensor_cycles += busy
            self.products_end = max(self.products_end, self.time + PRODUCT_START) + busy
            latency = self.products_end - self.time + PRODUCT_END
        elif opcode == "WARPGROUP" and "DEPBAR" in instruction.modifiers:
            self.time = max(self.time, self.products_end + PRODUCT_END)
        elif opcode == "BAR":
            self.time += BARRIER
        if instruction.write_barrier != NO_SCOREBOARD:
            self._set(instruction.write_barrier, latency)
        if instruction.read_barrier != NO_SCOREBOARD:
            self._set(instruction.read_barrier, min(latency, OPERANDS_READ))
        self.time += max(1, instruction.stall)

    def _set(self, number: int, latency: float) -> None:
        if number < len(self.scoreboards):
            self.scoreboards[number] = max(self.scoreboards[number], self.time + latency)


def tensor_cycles(name: str) -> float:
    """Cycles for which a product of a warp group occupies the tensor cores of a multiprocessor.

    Those of a multiprocessor do 64 x N x 16 16-bit multiplications in N / 2 cycles, and no product takes less than 16.

    >>> tensor_cycles("HGMMA.64x128x16.F32.BF16")
    66.0
    """
    size = re.search(r"\.64x(\d+)x", name)
    assert size is not None, name
    return max(int(size[1]) / 2, 16.0) + 2.0


def requested_bytes(instruction: Instruction) -> int:
    """Bytes that a warp requests from the L2 cache by an instruction, masks left out of account; 0 for most.

    For the scans and gradients of a scalar decay, at whole chunks, within 2 % of what the interpreter counts.

    >>> requested_bytes(Instruction("LDGSTS.E.BYPASS.128", (), "", False, 1, 7, 7, 0))
    512
    """
    if instruction.opcode not in ("LDG", "LDGSTS", "STG"):
        return 0
    wide = instruction.modifiers & {"128", "64", "U16", "U8"}
    size = {"128": 16, "64": 8, "U16": 2, "U8": 1}[min(wide)] if wide else 4
    return 0 if instruction.opcode == "LDG" and size <= SHARED_LOAD_BYTES else size * THREADS


def exits_of_loops(code: Sequence[Instruction]) -> set[int]:
    """The places of conditional branches that leave a loop whose own branch back has no condition."""
    found: set[int] = set()
    for end, instruction in enumerate(code):
        if instruction.target is None or instruction.predicate or instruction.target >= end:
            continue
        body = range(instruction.target, end)
        if any(code[at].opcode == "EXIT" and not code[at].predicate for at in body):
            continue  # code that was moved behind the end of the kernel and goes back
        found |= {at for at in body if code[at].predicate and (code[at].target or 0) > end}
    return found


class _Loops:
    """The loops of a kernel whose ends are data, by the places of the branches that end a round, and their trips."""

    def __init__(self, code: Sequence[Instruction], trips: int | Mapping[int, int]):
        self.code, self.trips, self.exits = code, trips, exits_of_loops(code)
        self.rounds: dict[int, int] = {}
        self.first = {} if isinstance(trips, int) else {at: min(at, code[at].target or 0) for at in trips}

    def takes(self, at: int) -> bool:
        """Whether a branch is taken whose condition is data."""
        target = self.code[at].target
        assert target is not None
        back = target <= at
        if back or at in self.exits:
            self.rounds[at] = self.rounds.get(at, 0) + 1
            again = self.rounds[at] < (self.trips if isinstance(self.trips, int) else self.trips[at])
            if not again:
                self.rounds[at] = 0
            return again if back else not again
        if isinstance(self.trips, int):
            return False
        inside = {last: times for last, times in self.trips.items() if at < last < target}
        return bool(inside) and not any(inside.values()) and all(at < self.first[last] for last in inside)


def simulate(code: Sequence[Instruction], *, data_trips: int | Sequence[int] = 1,
             program: Mapping[str, int] | None = None) -> ProgramCost:
    """Run one warp through the code.

    Args:
        code: the instructions of a kernel.
        data_trips: how often a loop runs whose end is not in the code. A number per loop where they differ, in the
            order of the code; inner loops come before the loop around them.
        program: the number of the program by axis, "X", "Y" and "Z"; programs of other numbers may take other branches.

    Raises:
        ValueError: the code does not end, or has other loops than `data_trips`.
    """
    if isinstance(data_trips, int):
        return _run(code, _Loops(code, data_trips), program)
    loops = _Loops(code, 1)
    _run(code, loops, program)
    if len(loops.rounds) != len(data_trips):
        raise ValueError(f"the code has {len(loops.rounds)} loops whose end is data, not {len(data_trips)}")
    return _run(code, _Loops(code, dict(zip(sorted(loops.rounds), data_trips, strict=True))), program)


def _run(code: Sequence[Instruction], loops: _Loops, program: Mapping[str, int] | None) -> ProgramCost:
    registers = Registers({"X": 0, "Y": 0, "Z": 0} | dict(program or {}))
    warp = _Warp()
    at = 0
    while at < len(code):
        if warp.instructions > LONGEST_RUN:
            raise ValueError(f"the code does not end within {LONGEST_RUN} instructions")
        instruction = code[at]
        warp.issue(instruction)
        holds = registers.holds(instruction)
        if holds is not False:
            warp.requested += requested_bytes(instruction)
        if instruction.opcode == "EXIT":
            if holds:
                break
        elif instruction.target is not None:
            if loops.takes(at) if holds is None else holds:
                at = instruction.target
                continue
        else:
            registers.execute(instruction)
        at += 1
    return ProgramCost(warp.time, warp.instructions, warp.tensor_cycles, len(loops.rounds), warp.requested)


@dataclass(frozen=True)
class KernelCost:
    """The cost of a compiled kernel: the resources of a block, and what each kind of its programs takes.

    Programs that differ in the last axis of the grid may do different work (queries and keys, say): one entry each.
    """

    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per block
    num_warps: int
    code_length: int  # instructions
    programs: tuple[ProgramCost, ...]

    def blocks(self, device: Device = H200) -> int:
        """Blocks that a multiprocessor holds at once."""
        return resident_blocks(self.registers, self.shared, self.num_warps, device.registers, device.shared_bytes,
                               device.warps)

    def multiprocessor_cycles(self, device: Device = H200) -> float:
        """Cycles of a full multiprocessor per program of each kind, all kinds together."""
        return sum(self._cycles(program, self.blocks(device)) / self.blocks(device) for program in self.programs)

    def _cycles(self, program: ProgramCost, together: int) -> float:
        """Cycles of a program when so many share a multiprocessor, which issues four instructions per cycle."""
        groups = max(1.0, self.num_warps / 4)
        return max(program.cycles, together * program.instructions * self.num_warps / 4,
                   together * program.tensor_cycles * groups)

    def seconds(self, grid: Sequence[int], unique_bytes: float = 0.0, device: Device = H200) -> float:
        """Seconds of a launch: its start, and the longest of cycles, requests from the L2 cache and memory traffic."""
        count, kinds = math.prod(grid), len(self.programs)
        blocks = self.blocks(device)
        full = device.multiprocessors * blocks
        rounds, rest = divmod(count, full)

        def each(together: int) -> float:
            return sum(self._cycles(program, together) for program in self.programs) / kinds

        cycles = rounds * each(blocks)
        if rounds >= 3:  # then programs follow one another without a common end of rounds
            cycles = count / full * each(blocks)
        elif rest:
            cycles += each(min(blocks, math.ceil(rest / device.multiprocessors)))
        requested = count / kinds * self.num_warps * sum(program.requested for program in self.programs)
        return device.launch_seconds + max(cycles / device.hertz, requested / device.l2_bytes_per_second,
                                           unique_bytes / device.bytes_per_second)


def cost_of(cubin: bytes, shared: int, num_warps: int, *, data_trips: int | Sequence[int] = 1, kinds: int = 1
            ) -> KernelCost:
    """The cost of a compiled kernel, whose grid has `kinds` programs along its last axis that may differ."""
    code = disassemble(cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", run_on_cubin("cuobjdump", ["-res-usage"], cubin))
    assert usage is not None, "cuobjdump names no registers"
    programs = tuple(simulate(code, data_trips=data_trips, program={"Z": kind}) for kind in range(kinds))
    return KernelCost(int(usage[1]), int(usage[2]), shared, num_warps, len(code), programs)
