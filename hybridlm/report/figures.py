"""Descriptions of figures, from which the page, the PNG files and the tables beside the figures are made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hybridlm.inspect import BYTES, scaled
from hybridlm.report.palette import Style

FEWEST_TICKS = 3  # of a logarithmic axis
MAX_LINE_POINTS = 400  # longer lines are averaged
MAX_HEAT_COLUMNS = 160
MAX_TABLE_ROWS = 40
Value = float | int | str | None


@dataclass(frozen=True)
class Axis:
    """One axis; `kind` is number, count, bytes or share, `categories` are texts in their order along it."""

    title: str
    kind: str = "number"
    log: bool = False
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class Series:
    """Points of one name.

    `low` and `high` are the ends of a spread: one standard deviation to each side, or the full range. A line that goes
    by `steps` keeps its value until the next point. `labels` are texts at points; a series that is not `tabled` repeats
    others.
    """

    name: str
    style: Style
    x: Sequence[Value]
    y: Sequence[Value]
    low: Sequence[Value] = ()
    high: Sequence[Value] = ()
    spread: Literal["std", "range"] = "std"
    line: bool = True
    points: bool = False
    steps: bool = False
    labels: Sequence[str] = ()
    tabled: bool = True


@dataclass(frozen=True)
class Panel:
    """One plot of a chart."""

    title: str
    series: list[Series]
    level: tuple[float, str] | None = None  # a horizontal line and its text


@dataclass(frozen=True)
class Table:
    """A table as texts."""

    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Panels with the same axes, side by side; `borders` are vertical lines, each with its text."""

    id: str
    title: str
    note: str
    x: Axis
    y: Axis
    panels: list[Panel]
    borders: list[tuple[float, str]] = field(default_factory=list)
    numbers: Table | None = None  # where the table is not simply that of the series
    wide: bool = False  # over the whole page

    def table(self) -> Table:
        """The table beside the chart."""
        return self.numbers or _table(self)


@dataclass(frozen=True)
class Heat:
    """A heat map of `z[row][column]`, the first row at the bottom; None where nothing was measured."""

    id: str
    title: str
    note: str
    x: Axis
    y: Axis
    z_title: str
    columns: list[Value]
    rows: list[str]
    z: list[list[Value]]

    def table(self) -> Table:
        """The table beside the heat map, of at most 12 columns."""
        chosen = spaced(len(self.columns), 12)
        note = "" if len(chosen) == len(self.columns) else f"{len(chosen)} of {len(self.columns)} columns"
        rows = [[name, *(number(self.z[row][column]) for column in chosen)] for row, name in enumerate(self.rows)]
        return Table([f"{self.y.title} / {self.x.title}", *(number(self.columns[column]) for column in chosen)], rows,
                     note)


Figure = Chart | Heat


def thinned(x: Sequence[float], y: Sequence[float],
            most: int = MAX_LINE_POINTS) -> tuple[list[float], list[float], int]:
    """Average a line to at most `most` points; returns x, y and n, the neighbours per point.

    >>> thinned([1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0], most=2)
    ([2, 4], [2.0, 6.0], 2)
    """
    n = math.ceil(len(x) / most) if x else 1
    if n == 1:
        return list(x), list(y), 1
    starts = range(0, len(x), n)
    return ([x[min(start + n, len(x)) - 1] for start in starts],
            [sum(part) / len(part) for part in (y[start:start + n] for start in starts)], n)


def averaged(n: int) -> str:
    """The sentence of a note that says how many steps a point averages, empty for one."""
    return f" Each point of a line is the mean of {n} steps." if n > 1 else ""


def spaced(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` indices, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def number(value: Value, kind: str = "number") -> str:
    """Format a value for a table: four significant digits, bytes with a unit.

    >>> number(0.123456), number(2048, "bytes"), number(None)
    ('0.1235', '2 KiB', '-')
    """
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    if kind == "bytes":
        return scaled(value, 1024, BYTES)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def extent(axis: Axis, values: Iterable[Value]) -> tuple[float, float, bool]:
    """Ends of the axis that all panels share, with some room, and whether it is logarithmic.

    An axis with values that are not positive is linear.
    """
    found = [float(value) for value in values if isinstance(value, int | float)]
    if axis.kind == "share":
        return -0.03, 1.03, False
    low, high = min(found, default=0.0), max(found, default=1.0)
    if axis.log and low > 0:
        room = (high / low) ** 0.08 if high > low else 1.5
        return low / room, high * room, True
    if axis.kind in ("bytes", "count"):
        low = min(low, 0.0)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room * (low != 0 or axis.kind == "number"), high + room, False


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... within a range, powers of ten alone where these are many, and round numbers where they are few.

    >>> log_ticks(1.8, 3.4)
    [2.0, 2.5, 3.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    found = [tick for tick in ticks if low <= tick <= high]
    power = math.floor(math.log10(high - low)) if high > low else 0
    for step in (10.0**power, 0.5 * 10.0**power, 0.2 * 10.0**power):
        if len(found) >= FEWEST_TICKS:
            break
        found = [float(f"{index * step:.6g}") for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return found


def values_of(chart: Chart, axis: Literal["x", "y"]) -> list[Value]:
    """Collect the values along an axis over all panels, spreads and levels included."""
    found: list[Value] = []
    for panel in chart.panels:
        for series in panel.series:
            found += series.x if axis == "x" else [*series.y, *series.low, *series.high]
        if axis == "y" and panel.level is not None:
            found.append(panel.level[0])
    return found


def legend(chart: Chart) -> dict[str, Series]:
    """The series of the legend by name; none for a single name."""
    named = {series.name: series for panel in chart.panels for series in panel.series}
    return named if len(named) > 1 else {}


def unit_of(axis: Axis, values: Sequence[Value]) -> tuple[float, str]:
    """The divisor of an axis' values and its title with the unit: bytes become MiB where they are many."""
    if axis.kind != "bytes":
        return 1.0, axis.title
    most = max((value for value in values if isinstance(value, int | float)), default=0)
    power = min(int(math.log(max(most, 1), 1024)), len(BYTES) - 1)
    return 1024.0**power, f"{axis.title} ({BYTES[power].strip()})"


def _table(chart: Chart) -> Table:
    """A row for each x of each panel, a column for each name; of many rows some that have all names."""
    names = list(dict.fromkeys(series.name for panel in chart.panels for series in panel.series if series.tabled))
    rows: list[tuple[int, list[str]]] = []
    for panel in chart.panels:
        cells: dict[Value, dict[str, str]] = {}
        for series in panel.series:
            for index, x in enumerate(series.x if series.tabled else ()):
                cells.setdefault(x, {})[series.name] = _cell(series, index, chart.y.kind)
        for x in _order(cells, chart.x):
            title = [panel.title] if len(chart.panels) > 1 else []
            rows.append((len(cells[x]), [*title, number(x, chart.x.kind), *(cells[x].get(name, "") for name in names)]))
    full = [row for count, row in rows if count == len(names)]
    if len(rows) <= MAX_TABLE_ROWS:
        chosen = [row for _, row in rows]
    else:
        source = full if len(full) > 1 else [row for _, row in rows]
        chosen = [source[index] for index in spaced(len(source), MAX_TABLE_ROWS)]
    header = [*([""] if len(chart.panels) > 1 else []), chart.x.title, *names]
    return Table(header, chosen, "" if len(chosen) == len(rows) else f"{len(chosen)} of {len(rows)} rows")


def _cell(series: Series, index: int, kind: str) -> str:
    value, text = series.y[index], number(series.y[index], kind)
    if not series.high or not isinstance(high := series.high[index], int | float) or not isinstance(value, int | float):
        return text
    if series.spread == "std":
        return f"{text} ± {scaled(high - value, 1024, BYTES) if kind == 'bytes' else f'{high - value:.2g}'}"
    return f"{text} ({number(series.low[index], kind)} to {number(high, kind)})"


def _order(cells: dict[Value, Any], axis: Axis) -> list[Value]:
    if axis.categories:
        return [x for x in axis.categories if x in cells]
    return sorted(cells, key=lambda x: (isinstance(x, str), x))  # type: ignore[arg-type,return-value]
