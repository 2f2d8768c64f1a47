"""Figures as PNG files, drawn by matplotlib on light ground."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hybridlm.files import write_bytes
from hybridlm.report.figures import (
    Axis,
    Chart,
    Figure,
    Heat,
    Panel,
    Series,
    Value,
    extent,
    legend,
    log_ticks,
    unit_of,
    values_of,
)
from hybridlm.report.palette import GRID, INK, MUTED

MARKERS = {"circle": "o", "square": "s", "triangle-up": "^", "diamond": "D", "triangle-down": "v", "cross": "P",
           "star": "*", "x": "X"}
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
MAX_PANELS_PER_ROW = 5
DPI = 150
LEGEND_LETTERS_PER_INCH, LEGEND_MARK_LETTERS = 12, 7  # of text of the legend, and what its line and gaps take


def write_png(figure: Figure, path: Path) -> None:
    """Draw a figure into a file, which appears complete or not at all; the same figure gives the same bytes."""
    drawn = _heat(figure) if isinstance(figure, Heat) else _chart(figure)
    data = io.BytesIO()
    drawn.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, data.getvalue())


def _chart(chart: Chart) -> Any:
    from matplotlib.figure import Figure as Canvas

    columns = min(MAX_PANELS_PER_ROW if len(chart.panels) <= MAX_PANELS_PER_ROW else 4, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    size = (6.4, 4.2) if len(chart.panels) == 1 else (3.4 * columns, 2.9 * rows + 0.8)
    canvas = Canvas(figsize=size, layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).flatten()
    x_unit, x_title = unit_of(chart.x, values_of(chart, "x"))
    y_unit, y_title = unit_of(chart.y, values_of(chart, "y"))
    handles: dict[str, Any] = {}
    for index, (ax, panel) in enumerate(zip(axes, chart.panels, strict=False)):
        for series in panel.series:
            handles.setdefault(series.name, _series(ax, chart.x, series, x_unit, y_unit))
        _decorate(ax, chart, panel, x_unit, y_unit)
        ax.set_xlabel(_plain(x_title) if index >= len(chart.panels) - columns else "")
        ax.set_ylabel(_plain(y_title) if index % columns == 0 else "")
    for ax in axes[len(chart.panels):]:
        ax.set_visible(False)
    canvas.suptitle(_plain(chart.title), fontsize=12, color=INK[0])
    if names := legend(chart):
        longest = max(len(_plain(name)) for name in names)
        columns = int(min(6, max(1, size[0] * LEGEND_LETTERS_PER_INCH // (longest + LEGEND_MARK_LETTERS))))
        canvas.legend([handles[name] for name in names], [_plain(name) for name in names], loc="outside lower center",
                      ncols=columns, frameon=False, fontsize=9)
    return canvas


def _series(ax: Any, axis: Axis, series: Series, x_unit: float, y_unit: float) -> Any:
    style = series.style
    x = [axis.categories.index(str(value)) for value in series.x] if axis.categories else _scaled(series.x, x_unit)
    y, low, high = (_scaled(values, y_unit) for values in (series.y, series.low, series.high))
    look = {"color": style.colour[0], "linestyle": DASHES[style.dash] if series.line else "none", "linewidth": 1.6,
            "marker": MARKERS[style.symbol] if series.points else "", "markersize": 5.5, "markeredgecolor": "white",
            "markeredgewidth": 0.6, "drawstyle": "steps-post" if series.steps else "default"}
    if series.spread == "range" and series.high:
        ax.fill_between(x, low, high, color=style.colour[0], alpha=0.2, linewidth=0)
    elif series.high:
        known = [i for i in range(len(x)) if low[i] == low[i]]
        ax.errorbar([x[i] for i in known], [y[i] for i in known], [high[i] - y[i] for i in known], fmt="none",
                    ecolor=style.colour[0], alpha=0.6, elinewidth=1, capsize=2)
    if series.labels and not series.points:
        for at, value, label in zip(x, y, series.labels, strict=True):
            ax.annotate(_plain(label), (at, value), xytext=(4, 4), textcoords="offset points", fontsize=7.5,
                        color=MUTED[0])
    return ax.plot(x, y, **look)[0]


def _scaled(values: Sequence[Value], unit: float) -> list[float]:
    return [value / unit if isinstance(value, int | float) else float("nan") for value in values]


def _decorate(ax: Any, chart: Chart, panel: Panel, x_unit: float, y_unit: float) -> None:
    which: Literal["x", "y"]
    ax.set_title(_plain(panel.title), fontsize=10, color=MUTED[0])
    ax.grid(color=GRID[0], linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=MUTED[0], labelsize=8.5)
    if chart.x.categories:
        ax.set_xticks(range(len(chart.x.categories)), [_plain(name) for name in chart.x.categories])
        ax.set_xlim(-0.35, len(chart.x.categories) - 0.65)
    for which, axis, unit in (("x", chart.x, x_unit), ("y", chart.y, y_unit)):
        if not axis.categories:
            low, high, log = extent(axis, values_of(chart, which))
            ax.set(**{f"{which}scale": "log" if log else "linear", f"{which}lim": (low / unit, high / unit)})
            if log:
                ticks = log_ticks(low / unit, high / unit)
                ax.set(**{f"{which}ticks": ticks, f"{which}ticklabels": [f"{tick:g}" for tick in ticks]})
                ax.minorticks_off()
    for at, text in chart.borders:
        ax.axvline(at / x_unit, color=MUTED[0], linewidth=0.8, linestyle=":")
        ax.annotate(_plain(text), (at / x_unit, 1), xycoords=("data", "axes fraction"), xytext=(2, 2),
                    textcoords="offset points", fontsize=8, color=MUTED[0])
    if panel.level is not None:
        ax.axhline(panel.level[0] / y_unit, color=MUTED[0], linewidth=0.8, linestyle=":")
        ax.annotate(panel.level[1], (1, panel.level[0] / y_unit), xycoords=("axes fraction", "data"), ha="right",
                    xytext=(0, 2), textcoords="offset points", fontsize=8, color=MUTED[0])


def _heat(heat: Heat) -> Any:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.2, max(2.4, 1.2 + 0.22 * len(heat.rows))), layout="constrained")
    ax = canvas.subplots()
    z = [_scaled(row, 1.0) for row in heat.z]
    image = ax.imshow(z, aspect="auto", origin="lower", cmap="cividis", vmin=0, interpolation="nearest")
    ax.set_yticks(range(len(heat.rows)), [_plain(row) for row in heat.rows], fontsize=8)
    every = max(1, len(heat.columns) // 10)
    ticks = range(0, len(heat.columns), every)
    ax.set_xticks(ticks, [str(heat.columns[tick]) for tick in ticks], fontsize=8)
    ax.set_xlabel(_plain(heat.x.title))
    ax.set_ylabel(_plain(heat.y.title))
    ax.set_title(_plain(heat.title), fontsize=12, color=INK[0])
    canvas.colorbar(image, ax=ax, label=heat.z_title)
    return canvas


def _plain(text: str) -> str:
    """Escape dollar signs, between which matplotlib would read formulas."""
    return text.replace("$", r"\$")
