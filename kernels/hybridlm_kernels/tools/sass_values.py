"""Values of integer registers as far as the code alone decides them: counters of loops, and the number of a program.

Loops over head dims, levels and blocks have bounds that are constants of the code, so emulating the integer
arithmetic says how often each runs, also where the compiler has unrolled it. Anything that comes from memory is
unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from hybridlm_kernels.tools.sass import Instruction

_WORD = 0xFFFFFFFF
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b}
_PREDICATE = re.compile(r"!?U?P[T0-9]\d*$")


class Registers:
    """The known values of the registers and predicates of one warp; None where the code does not decide them."""

    def __init__(self, program: Mapping[str, int]):
        self.special = {f"SR_CTAID.{axis}": number for axis, number in program.items()}
        self.values: dict[str, int | None] = {"RZ": 0, "URZ": 0}
        self.predicates: dict[str, bool | None] = {"PT": True, "UPT": True}
        self.stack: dict[int, int | None] = {}  # words of spilled registers by their offsets

    def holds(self, instruction: Instruction) -> bool | None:
        """Whether the instruction takes effect."""
        if not instruction.predicate:
            return True
        value = self.predicates.get(instruction.predicate)
        return value if value is None else value != instruction.negated

    def execute(self, instruction: Instruction) -> None:
        """Take over what the instruction writes."""
        takes_effect = self.holds(instruction)
        if takes_effect is False or not instruction.operands:
            return
        handler = _HANDLERS.get(instruction.opcode)
        values, predicates = handler(self, instruction) if handler else _forget(instruction)
        for names, found in ((values, self.values), (predicates, self.predicates)):
            for name, value in names.items():
                if name not in ("RZ", "URZ", "PT", "UPT"):
                    found[name] = value if takes_effect else None  # type: ignore[assignment]

    def read(self, text: str) -> int | None:
        """The 32-bit value of an operand."""
        text = text.split(".")[0]
        if text.startswith(("-0x", "0x", "-0X")):
            return int(text, 16) & _WORD
        if text.startswith("-"):
            value = self.read(text[1:])
            return None if value is None else -value & _WORD
        if text.startswith("~"):
            value = self.read(text[1:])
            return None if value is None else ~value & _WORD
        return self.values.get(text)

    def read_predicate(self, text: str) -> bool | None:
        """The value of a predicate operand."""
        value = self.predicates.get(text.lstrip("!"))
        return value if value is None else value != text.startswith("!")


Written = tuple[dict[str, int | None], dict[str, bool | None]]


def _forget(instruction: Instruction) -> Written:
    """All that an instruction of no known meaning may write: its first operand, with the registers behind it."""
    values: dict[str, int | None] = {}
    if match := re.match(r"(U?R)(\d+)(\.\w+)?$", instruction.operands[0]):
        values = {f"{match[1]}{int(match[2]) + i}": None for i in range(_registers_written(instruction))}
    return values, dict.fromkeys(x for x in instruction.operands[:2] if _PREDICATE.match(x))


def _registers_written(instruction: Instruction) -> int:
    """The number of registers from the first operand on that the result takes, at most."""
    if size := re.search(r"\bHGMMA\.64x(\d+)x", instruction.name):
        return int(size[1]) // 2
    if instruction.opcode in ("HMMA", "LDSM") or "128" in instruction.modifiers:
        return 4
    return 2 if {"64", "WIDE"} & instruction.modifiers or instruction.opcode == "CS2R" else 1


def _move(registers: Registers, instruction: Instruction) -> Written:
    return {instruction.operands[0]: registers.read(instruction.operands[-1])}, {}


def _special(registers: Registers, instruction: Instruction) -> Written:
    return {instruction.operands[0]: registers.special.get(instruction.operands[1])}, {}


def _zero(registers: Registers, instruction: Instruction) -> Written:
    name, source = instruction.operands[0], instruction.operands[1]
    match = re.match(r"(U?R)(\d+)", name)
    assert match is not None
    value = 0 if source in ("SRZ", "RZ", "URZ") else None
    return {name: value, f"{match[1]}{int(match[2]) + 1}": value}, {}


def _add(registers: Registers, instruction: Instruction) -> Written:
    """IADD3, its carries included, and two-operand forms."""
    target, *operands = instruction.operands
    carries = []
    while operands and _PREDICATE.match(operands[0]):
        carries.append(operands.pop(0))
    carried = [x for x in operands if _PREDICATE.match(x)]
    terms = [registers.read(x) for x in operands if not _PREDICATE.match(x)]
    if "X" in instruction.modifiers:
        terms += [None if (bit := registers.read_predicate(x)) is None else int(bit) for x in carried if x != "!PT"
                  and x != "!UPT"]
    if any(term is None for term in terms):
        return {target: None}, dict.fromkeys(carries)
    total = sum(term for term in terms if term is not None)
    # One carry suffices: of three terms one is zero wherever loops count.
    return {target: total & _WORD}, dict.fromkeys(carries, total > _WORD)


def _multiply(registers: Registers, instruction: Instruction) -> Written:
    """IMAD in the forms of counters and addresses: MOV, IADD, SHL, X and the plain product."""
    if {"WIDE", "HI"} & instruction.modifiers:
        return _forget(instruction)
    target, *operands = instruction.operands
    words = [registers.read(x) for x in operands[:3]]
    bits = [registers.read_predicate(x) for x in operands[3:]] if "X" in instruction.modifiers else []
    a, b, c = (*words, None, None, None)[:3]
    product = 0 if a == 0 or b == 0 else None if a is None or b is None else a * b
    if product is None or c is None or None in bits:
        return {target: None}, {}
    return {target: (product + c + sum(map(bool, bits))) & _WORD}, {}


def _words(instruction: Instruction, place: str, first: str) -> list[tuple[int, str]]:
    """The offsets on the stack, and the registers, of a load or store there: 1, 2 or 4 of each; none where unknown."""
    address, register = re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", place), re.match(r"R(\d+|Z)", first)
    count = 4 if "128" in instruction.modifiers else 2 if "64" in instruction.modifiers else 1
    if address is None or register is None or {"U8", "S8", "U16", "S16"} & instruction.modifiers:
        return []
    offset = int(address[1] or "0", 16)
    return [(offset + 4 * i, "RZ" if register[1] == "Z" else f"R{int(register[1]) + i}") for i in range(count)]


def _spill(registers: Registers, instruction: Instruction) -> Written:
    """STL: registers to the stack; what is stored under a condition that is not known is not known either."""
    for offset, name in _words(instruction, instruction.operands[0], instruction.operands[1]):
        registers.stack[offset] = registers.read(name) if registers.holds(instruction) else None
    return {}, {}


def _reload(registers: Registers, instruction: Instruction) -> Written:
    """LDL: registers from the stack."""
    words = _words(instruction, instruction.operands[1], instruction.operands[0])
    return {name: registers.stack.get(offset) for offset, name in words} or _forget(instruction)[0], {}


def _shift(registers: Registers, instruction: Instruction) -> Written:
    target, low, amount, high = (*instruction.operands, "")[:4]
    value, by, upper = registers.read(low), registers.read(amount), registers.read(high)
    if by is None or by > 31:
        return {target: None}, {}
    if "L" in instruction.modifiers and value is not None:
        return {target: value << by & _WORD}, {}
    if "R" in instruction.modifiers and upper is not None and "HI" in instruction.modifiers:
        signed = upper - 2**32 if upper >> 31 and "S32" in instruction.modifiers else upper
        return {target: signed >> by & _WORD}, {}
    return {target: None}, {}


def _logic(registers: Registers, instruction: Instruction) -> Written:
    """LOP3: any function of three bits, given by its truth table."""
    operands = list(instruction.operands)
    predicates = [operands.pop(0)] if _PREDICATE.match(operands[0]) else []
    target, *rest = operands
    words = [registers.read(x) for x in rest[:3]]
    table = int(rest[3], 16) if len(rest) > 3 and rest[3].startswith("0x") else None
    if table is None or None in words:
        return {target: None}, dict.fromkeys(predicates)
    a, b, c = (word or 0 for word in words)
    result = 0
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return {target: result & _WORD}, {name: bool(result & _WORD) for name in predicates}


def _compare(registers: Registers, instruction: Instruction) -> Written:
    """ISETP, with the upper halves of 64-bit comparisons (EX)."""
    target, second, left, right, accumulated, *lower = instruction.operands
    a, b = registers.read(left), registers.read(right)
    way = next((word for word in instruction.name.split(".")[1:] if word in _COMPARE), None)
    result: bool | None = None
    if a is not None and b is not None and way is not None:
        if "U32" not in instruction.modifiers:
            a, b = ((x - 2**32 if x >> 31 else x) for x in (a, b))
        result = _COMPARE[way](a, b)
        if "EX" in instruction.modifiers:
            below = registers.read_predicate(lower[0]) if lower else None
            strict = {"GE": a > b, "GT": a > b, "LE": a < b, "LT": a < b, "EQ": False, "NE": a != b}[way]
            result = (strict or below) if a == b or way == "NE" else strict
    other = registers.read_predicate(accumulated)
    both = _combine(result, other, "OR" in instruction.modifiers)
    return {}, {target: both, second: None}


def _combine(a: bool | None, b: bool | None, either: bool) -> bool | None:
    """a and b, or a or b, as far as they are known."""
    if either in (a, b):
        return either
    return None if None in (a, b) else not either


def _predicate_logic(registers: Registers, instruction: Instruction) -> Written:
    """PLOP3: a function of three predicates, known where the unknown ones make no difference to it."""
    target, second, *rest = instruction.operands
    inputs = [registers.read_predicate(x) for x in rest[:3]]
    table = int(rest[3], 16)
    results = {bool(table >> row & 1) for row in range(8)
               if all(known is None or known == bool(row >> 2 - place & 1) for place, known in enumerate(inputs))}
    return {}, {target: results.pop() if len(results) == 1 else None, second: None}


def _save_predicates(registers: Registers, instruction: Instruction) -> Written:
    """P2R: predicates as bits of a register, those of a mask; other bits are those of a second register."""
    target, _, base, mask = instruction.operands
    bits, others = int(mask, 16), registers.read(base)
    chosen = [registers.read_predicate(f"P{n}") if bits >> n & 1 else False for n in range(7)]
    if others is None or None in chosen:
        return {target: None}, {}
    return {target: others & ~bits | sum(1 << n for n, holds in enumerate(chosen) if holds)}, {}


def _select(registers: Registers, instruction: Instruction) -> Written:
    target, a, b, condition = instruction.operands[:4]
    chosen = registers.read_predicate(condition)
    return {target: None if chosen is None else registers.read(a if chosen else b)}, {}


_HANDLERS: dict[str, Callable[[Registers, Instruction], Written]] = {
    "MOV": _move, "UMOV": _move, "R2UR": _move, "VIADD": _add, "IADD3": _add, "UIADD3": _add, "IADD": _add,
    "IMAD": _multiply, "UIMAD": _multiply, "SHF": _shift, "USHF": _shift, "LOP3": _logic, "ULOP3": _logic,
    "ISETP": _compare, "UISETP": _compare, "PLOP3": _predicate_logic,
    "UPLOP3": _predicate_logic, "SEL": _select, "USEL": _select, "P2R": _save_predicates,
    "STL": _spill, "LDL": _reload, "S2R": _special, "S2UR": _special, "CS2R": _zero, "UCS2R": _zero}
