"""Writes the report of a run or sweep folder into files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm.errors import ConfigError, UserError
from hybridlm.files import write_text
from hybridlm.report.comparison import Comparison, config_differences, final_numbers, read_comparison
from hybridlm.report.document import ReportDocument, document
from hybridlm.report.figures import Chart
from hybridlm.report.page import html
from hybridlm.report.png import write_png
from hybridlm.report.read import Run, Sweep, read

PAGE_FILE = "report.html"
COMPARISON_FILE = "comparison.html"  # in the folder of the first run that is compared


def write_report(path: str | Path | Sequence[str | Path], *, output: str | Path | None = None,
                 png: str | Path | None = None, metrics: Sequence[str] = (),
                 refresh: int | None = None) -> dict[str, Any]:
    """Write the page of a run or sweep, or of several runs beside one another, and its figures as PNG files.

    Args:
        path: a run folder or sweep folder; several run folders are compared.
        output: file of the page; default report.html in the folder, or comparison.html in that of the first run.
        png: folder for PNG files; default none are written.
        metrics: names of metrics that are drawn beside the usual figures.
        refresh: seconds after which the page loads itself again.

    Returns:
        The runs that were read and the figures that were drawn, ready for JSON.

    Raises:
        ConfigError: no run or sweep there, nothing to draw, a metric no run has, a place that cannot be written.
        UserError: plotly or matplotlib is not installed.
    """
    needed = ["plotly", *(["matplotlib"] if png is not None else [])]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"a report needs the package {package}; pip install 'hybridlm[report]'")
    from plotly.offline import get_plotlyjs

    paths = [path] if isinstance(path, str | Path) else list(path)
    compared = len(paths) > 1
    found: Run | Sweep | Comparison
    found = read_comparison(paths, metrics) if compared else read(paths[0], list(metrics))
    page = document(found, metrics)
    default = Path(paths[0]).expanduser() / (COMPARISON_FILE if compared else PAGE_FILE)
    file = Path(output) if output is not None else default
    pictures: list[str] = []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, html(page, get_plotlyjs(), refresh))
        if png is not None:
            Path(png).mkdir(parents=True, exist_ok=True)
            for figure in page.figures:
                write_png(figure, Path(png) / f"{figure.id}.png")
                pictures.append(str(Path(png) / f"{figure.id}.png"))
    except OSError as error:
        raise ConfigError("report", f"cannot be written ({error.strerror})", got=str(file)) from None
    return {"kind": page.kind, "name": page.name, "page": str(file), "png": pictures, "runs": _runs(found),
            "figures": _figures(page), "notes": page.notes,
            **({"final": final_numbers(found), "differences": config_differences(found)}
               if isinstance(found, Comparison) else {})}


def _runs(found: Run | Sweep | Comparison) -> list[dict[str, Any]]:
    runs: list[tuple[str, Run, list[str]]]
    if isinstance(found, Run):
        runs = [(found.name, found, [])]
    elif isinstance(found, Comparison):
        runs = [(name, run, []) for name, run in found.pairs()]
    else:
        runs = [(point.row["point"], point.run, sorted(point.probes)) for point in found.points]
    return [{"name": name, "steps": run.steps, "metrics": len(run.curves), "corrupt_lines": run.corrupt_lines,
             "probes": probes} for name, run, probes in runs]


def _figures(page: ReportDocument) -> list[dict[str, Any]]:
    rows = []
    for figure in page.figures:
        row: dict[str, Any] = {"id": figure.id, "title": figure.title}
        if isinstance(figure, Chart):
            series = [each for panel in figure.panels for each in panel.series]
            row |= {"panels": len(figure.panels), "series": list(dict.fromkeys(each.name for each in series)),
                    "points": sum(len(each.x) for each in series)}
        else:
            row |= {"rows": figure.rows, "columns": len(figure.columns)}
        rows.append(row)
    return rows
