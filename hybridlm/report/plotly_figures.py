"""Figures for plotly.js as plain data, one plot per panel. Colours are {"$": [on light ground, on dark ground]}."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from hybridlm.report.figures import (
    Axis,
    Chart,
    Figure,
    Heat,
    Panel,
    Series,
    Value,
    extent,
    log_ticks,
    unit_of,
    values_of,
)
from hybridlm.report.palette import GRID, GROUND, INK, MUTED, Pair

HEIGHT_PX = 300  # of a panel
SMALL_HEIGHT_PX = 240  # of a panel where there are more than three
HEAT_ROW_HEIGHT_PX = 22
SYMBOL_SIZES = {"triangle-up": 10, "triangle-down": 10, "diamond": 9, "star": 11}  # pixels; as large as a circle of 8
CLEAR = "rgba(0,0,0,0)"
CIVIDIS = [[0, "#00224e"], [0.2, "#35456c"], [0.4, "#666970"], [0.6, "#948e77"], [0.8, "#c8b866"], [1, "#fee838"]]


def plots(figure: Figure) -> list[dict[str, Any]]:
    """Make {title, data, layout, height} for each panel."""
    if isinstance(figure, Heat):
        return [_heat(figure)]
    return [_panel(figure, panel) for panel in figure.panels]


def themed(pair: Pair, alpha: str = "") -> dict[str, list[str]]:
    """The colours of both themes, from which the page takes one; `alpha` is two hexadecimal digits."""
    return {"$": [colour + alpha for colour in pair]}


def _panel(chart: Chart, panel: Panel) -> dict[str, Any]:
    x_unit, x_title = unit_of(chart.x, values_of(chart, "x"))
    y_unit, y_title = unit_of(chart.y, values_of(chart, "y"))
    layout = _layout(_axis(chart, "x", x_unit, x_title), _axis(chart, "y", y_unit, y_title))
    data = [trace for series in panel.series for trace in _traces(series, x_unit, y_unit)]
    shapes, notes = layout["shapes"], layout["annotations"]
    for at, text in chart.borders:
        shapes.append(_line(x0=at / x_unit, x1=at / x_unit, y0=0, y1=1, yref="paper"))
        notes.append(_text(text, x=at / x_unit, y=1, yref="paper", xanchor="left", yanchor="bottom"))
    if panel.level is not None:
        level = panel.level[0] / y_unit
        shapes.append(_line(x0=0, x1=1, xref="paper", y0=level, y1=level))
        notes.append(_text(panel.level[1], x=1, xref="paper", y=level, xanchor="right", yanchor="bottom"))
    return {"title": panel.title, "data": data, "layout": layout,
            "height": HEIGHT_PX if len(chart.panels) <= 3 else SMALL_HEIGHT_PX}


def _traces(series: Series, x_unit: float, y_unit: float) -> list[dict[str, Any]]:
    name, style, x = escape(series.name, quote=False), series.style, _scaled(series.x, x_unit)
    colour, y = themed(style.colour), _scaled(series.y, y_unit)
    low, high = _scaled(series.low, y_unit), _scaled(series.high, y_unit)
    traces = []
    group = {"type": "scatter", "name": name, "legendgroup": name, "x": x}
    spread = series.spread == "range" and bool(series.high)
    if spread:
        edge = {**group, "mode": "lines", "line": {"width": 0, "color": colour}, "hoverinfo": "skip"}
        traces += [{**edge, "y": low}, {**edge, "y": high, "fill": "tonexty", "fillcolor": themed(style.colour, "33")}]
    trace: dict[str, Any] = {**group, "y": y, "hoverinfo": "x+y+name", "line": {
        "color": colour, "width": 2, "dash": style.dash, "shape": "hv" if series.steps else "linear"}}
    trace["mode"] = "+".join(["lines"] * series.line + ["markers"] * series.points) or "lines"
    if series.points:
        trace["marker"] = {"color": colour, "symbol": style.symbol, "size": SYMBOL_SIZES.get(style.symbol, 8),
                           "line": {"width": 1, "color": themed(GROUND)}}
    if series.labels:
        trace |= {"text": [f"\u00a0\u00a0{escape(label, quote=False)}" for label in series.labels]}
        trace |= {"hoverinfo": "x+y+text"} if series.points else {
            "mode": "lines+text", "hoverinfo": "skip", "textposition": "top right", "cliponaxis": False,
            "textfont": {"size": 11, "color": themed(MUTED)}}
    if series.high and not spread:
        array = [up - mean if isinstance(up, int | float) and isinstance(mean, int | float) else None
                 for up, mean in zip(high, y, strict=True)]
        trace["error_y"] = {"type": "data", "array": array, "color": themed(style.colour, "99"), "thickness": 1.2,
                            "width": 3}
    return [*traces, trace]


def _scaled(values: Sequence[Value], unit: float) -> list[Value]:
    return [value / unit if isinstance(value, int | float) and unit != 1 else value for value in values]


def _axis(chart: Chart, which: Any, unit: float, title: str) -> dict[str, Any]:
    axis: Axis = chart.x if which == "x" else chart.y
    made: dict[str, Any] = {"title": {"text": escape(title, quote=False), "standoff": 8}}
    if axis.categories:
        room = 0.35
        return made | {"type": "category", "categoryorder": "array", "categoryarray": list(axis.categories),
                       "range": [-room, len(axis.categories) - 1 + room]}
    low, high, log = extent(axis, values_of(chart, which))
    if log:
        ticks = log_ticks(low / unit, high / unit)
        made |= {"type": "log", "range": [math.log10(low / unit), math.log10(high / unit)], "tickvals": ticks,
                 "ticktext": [f"{tick:g}" for tick in ticks]}
    else:
        made |= {"type": "linear", "range": [low / unit, high / unit], "nticks": 6}
    if axis.kind == "count":
        made["tickformat"] = "~s"
    return made


def _layout(x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    common = {"gridcolor": themed(GRID), "linecolor": themed(MUTED), "zerolinecolor": themed(GRID), "ticks": "",
              "automargin": True, "tickfont": {"color": themed(MUTED)}}
    return {"xaxis": common | x, "yaxis": common | y, "showlegend": False, "paper_bgcolor": CLEAR,
            "plot_bgcolor": CLEAR, "margin": {"l": 8, "r": 12, "t": 18, "b": 8}, "hovermode": "closest",
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": themed(INK)}, "shapes": [],
            "hoverlabel": {"namelength": -1, "bgcolor": themed(GROUND), "bordercolor": themed(MUTED),
                           "font": {"color": themed(INK)}}, "annotations": []}


def _line(**where: Any) -> dict[str, Any]:
    return {"type": "line", "layer": "below", "line": {"color": themed(MUTED), "width": 1, "dash": "dot"}, **where}


def _text(text: str, **where: Any) -> dict[str, Any]:
    font = {"size": 11, "color": themed(MUTED)}
    return {"text": escape(text, quote=False), "showarrow": False, "font": font, **where}


def _heat(heat: Heat) -> dict[str, Any]:
    layout = _layout({"title": {"text": heat.x.title}, "nticks": 12, "showgrid": False, "zeroline": False},
                     {"title": {"text": heat.y.title}, "type": "category", "showgrid": False})
    most = max((value for row in heat.z for value in row if isinstance(value, int | float)), default=1.0) or 1.0
    gap = 1 if len(heat.columns) <= 40 else 0
    bar = {"title": {"text": heat.z_title, "side": "right"}, "thickness": 12, "outlinewidth": 0, "len": 1,
           "tickfont": {"color": themed(MUTED)}}
    trace = {"type": "heatmap", "x": heat.columns, "y": [escape(row, quote=False) for row in heat.rows], "z": heat.z,
             "colorscale": CIVIDIS, "zmin": 0, "zmax": most, "xgap": gap, "ygap": 1, "hoverongaps": False,
             "colorbar": bar}
    if heat.columns and isinstance(heat.columns[0], str):
        layout["xaxis"]["type"] = "category"
    height = max(220, 90 + HEAT_ROW_HEIGHT_PX * len(heat.rows))
    return {"title": "", "data": [trace], "layout": layout, "height": height}
