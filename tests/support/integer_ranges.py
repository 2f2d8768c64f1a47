"""Which addresses of a Triton kernel are made of 32-bit integers that can overflow: interval arithmetic over its TTIR.

A value is (least, greatest, whether an overflow may be in it). Nothing is run.
"""

import re

WIDE = (-(2**63), 2**63 - 1, False)
NARROW = (-(2**31), 2**31 - 1, False)
COUNT = (-(2**28), 2**28, False)  # unknown numbers of 32 bits: arguments, what is loaded, carried or cut to size
OPERATION = re.compile(r"^(?:(%[\w$.-]+)(?::(\d+))? = )?\"?([a-z_]+\.[a-z_0-9.]+)\"?(.*)$")
NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
INTEGER = re.compile(r"(?:tensor<[\dx]*x?)?(i\d+)>?$")


def width_of(line):
    """Bits of the integers that the line's last type names; 0 where they are none."""
    found = INTEGER.search(re.sub(r" loc\(.*\)$", "", line).rstrip(" {"))
    return int(found[1][1:]) if found else 0


def within(x, y):
    return x[0] >= y[0] and x[1] <= y[1] and x[2] <= y[2]


def join(*values):
    return min(x[0] for x in values), max(x[1] for x in values), any(x[2] for x in values)


class Ranges:
    """Walks a kernel; `overflows` are the lines of offsets with an overflow in them, `offsets` counts all."""

    def __init__(self, text, arguments, programs, loaded=(0, 2**40)):
        """`arguments` gives the least and greatest value of integers by name, `programs` the greatest program ids,
        `loaded` what numbers of 64 bits in memory are."""
        self.arguments, self.programs, self.loaded = arguments, programs, loaded
        self.known, self.overflows, self.offsets = {}, [], 0
        lines = [line.strip() for line in text.splitlines()]
        at = next(i for i, line in enumerate(lines) if line.startswith("tt.func public"))
        for name, bits in re.findall(r"(%\w+): (i\d+)", lines[at]):
            self.known[name] = (*arguments.get(name[1:], (0, COUNT[1]) if bits != "i1" else (0, 1)), False)
        self.walk(lines, at + 1)

    def walk(self, lines, at):
        """Until the region ends; returns where, and what it yields."""
        yielded = []
        while at < len(lines):
            line = lines[at]
            if line.startswith("}"):
                return at, yielded
            found = OPERATION.match(line)
            if not found:
                at += 1
                continue
            name, count, operation, rest = found.groups()
            if operation.endswith((".yield", ".return", "scf.condition")):
                yielded = [self.of(x) for x in NAME.findall(rest.split(" : ")[0])]
                at += 1
            elif operation == "scf.for":
                at = self.loop(lines, at, name, rest)
            elif operation in ("scf.if", "scf.while", "tt.reduce", "tt.scan", "tt.map_elementwise"):
                at = self.region(lines, at, name, int(count or 1), operation, line)
            else:
                if operation == "tt.addptr":
                    self.offsets += 1
                    if any(self.of(x)[2] for x in NAME.findall(rest.split(" : ")[0])):
                        self.overflows.append(line)
                if name:
                    self.known[name] = self.result(operation, rest, line)
                at += 1
        return at, yielded

    def of(self, name):
        return self.known.get(name, WIDE)

    def loop(self, lines, at, name, rest):
        """A loop's variable runs between its bounds; what it carries grows until it is found not to, or is unknown."""
        head = rest.split(" : ")[0]
        names = NAME.findall(head.split("iter_args")[0])
        variable, low, high = names[:3]
        carried = NAME.findall(head.split("iter_args")[1]) if "iter_args" in head else []
        inner, initial = carried[::2], [self.of(x) for x in carried[1::2]]
        self.known[variable] = (self.of(low)[0], max(self.of(low)[0], self.of(high)[1] - 1),
                                self.of(low)[2])
        found = len(self.overflows)
        types = rest.split("-> (")[1].split(")  : ")[0].split(", ") if carried else []
        unknown = [COUNT if re.search(r"\bi32>?$|xi32>$", kind) else WIDE for kind in types]
        current = initial
        for last in (False, True):
            del self.overflows[found:]
            self.known.update(zip(inner, current, strict=True))
            end, yielded = self.walk(lines, at + 1)
            if all(within(y, c) for c, y in zip(current, yielded, strict=True)) or last:
                break
            current = [c if within(y, c) else (u[0], u[1], y[2])
                       for c, y, u in zip(current, yielded, unknown, strict=True)]
        for i, x in enumerate(current):
            self.known[f"{name}#{i}"] = x
            if len(current) == 1:
                self.known[name] = x
        return end + 1

    def region(self, lines, at, name, count, operation, line):
        """Branches are joined; results of other regions are unknown."""
        results, start = [], at
        if line.endswith("{") or operation != "scf.if":
            while not lines[at].endswith("{") and "({" not in lines[at]:
                at += 1
            while True:
                at, yielded = self.walk(lines, at + 1)
                results.append(yielded)
                if not (lines[at].startswith("} else {") or lines[at].startswith("} do {")):
                    break
        unknown = WIDE if width_of(lines[at]) == 64 else COUNT
        if operation == "tt.reduce" and re.search(r"arith\.(min|max)si", " ".join(lines[start:at])):
            unknown = self.of(NAME.findall(line)[1])
        known = operation == "scf.if" and all(len(r) == count for r in results)
        for i in range(count):
            x = join(*(r[i] for r in results)) if known else unknown
            self.known[f"{name}#{i}" if count > 1 else name] = x
        return at + 1

    def result(self, operation, rest, line):
        bits = width_of(line)
        x, y, *_ = [*(self.of(n) for n in NAME.findall(rest.split(" : ")[0])), WIDE, WIDE]
        if operation == "arith.constant":
            found = re.match(r" (?:dense<)?(-?\d+|true|false)>? :", rest)
            value = found and {"true": 1, "false": 0}.get(found[1], found[1])
            return (int(value), int(value), False) if found else WIDE
        if operation == "tt.get_program_id":
            most = self.programs["xyz".index(rest.split()[0])]
            return 0, most, False
        if operation == "tt.make_range":
            end, start = (int(re.search(rf"{key} = (\d+)", rest)[1]) for key in ("end", "start"))
            return start, end - 1, False
        if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi",
                         "arith.extui", "ttg.convert_layout", "tt.unsplat"):
            return x
        if operation == "tt.load":
            return COUNT if "ptr<i32>" in line else (0, 1, False) if bits == 1 else (*self.loaded, False)
        exact = {
            "arith.addi": lambda: (x[0] + y[0], x[1] + y[1]),
            "arith.subi": lambda: (x[0] - y[1], x[1] - y[0]),
            "arith.muli": lambda: (min(a * b for a in x[:2] for b in y[:2]), max(a * b for a in x[:2] for b in y[:2])),
            "arith.shli": lambda: (min(x[0], x[0] << max(0, min(y[1], 31))), max(0, x[1]) << max(0, min(y[1], 31))),
            "arith.minsi": lambda: (min(x[0], y[0]), min(x[1], y[1])),
            "arith.maxsi": lambda: (max(x[0], y[0]), max(x[1], y[1])),
            "arith.divsi": lambda: (min(x[0], 0), max(x[1] // max(1, y[0]), 0)),
            "arith.remsi": lambda: (min(x[0], 0), max(0, min(x[1], y[1] - 1))),
            "arith.andi": lambda: (min(x[0], y[0]) if x[0] < 0 and y[0] < 0 else 0, max(x[1], y[1])),
        }.get(operation)
        if operation == "arith.select":
            _, a, b = (self.of(n) for n in NAME.findall(rest.split(" : ")[0]))
            return join(a, b)
        if operation == "arith.trunci":
            return max(x[0], COUNT[0]), min(x[1], COUNT[1]), x[2]
        if exact is None:
            return (0, 1, False) if operation == "arith.cmpi" else COUNT if bits == 32 else WIDE
        low, high = exact()
        if bits == 32 and (low < NARROW[0] or high > NARROW[1]):
            return *NARROW[:2], True
        return max(low, WIDE[0]), min(high, WIDE[1]), x[2] or y[2]
