"""Tables of a ladder's results in Markdown, from its `ladder.json`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from sweep_tables import table_header, table_row  # the file beside this one

Report = Mapping[str, Any]


def tabulate_losses(report: Report) -> str:
    """Losses by seed, paired differences to the reference and compute gains, for every rung and architecture.

    Args:
        report: the content of `ladder.json`.
    """
    lines = table_header("rung", "architecture", "bits per byte", "by seed", "difference", "compute gain", "tokens/s",
                         "ms per decoded token")
    for cell in report["cells"]:
        found = [row for row in report["comparisons"].get(cell["architecture"], []) if row["rung"] == cell["rung"]]
        difference, gain = ((_interval(found[0], key, form) if found else "")
                            for key, form in (("difference", "+.3f"), ("gain", ".2f")))
        lines.append(table_row(
            cell["rung"], cell["architecture"], _number(cell["mean"], ".3f"),
            " ".join(f"{loss:.3f}" for loss in cell["losses"].values()), difference, gain,
            _number(cell["tokens_per_second"], ",.0f"), _number(cell["decode_milliseconds_per_token"], ".2f")))
    return "\n".join(lines) + "\n"


def tabulate_scores(report: Report) -> str:
    """Accuracy of every probe at the largest rung, the mean over seeds and each seed in brackets.

    Args:
        report: the content of `ladder.json`.
    """
    points = [point for point in report["points"] if point["scores"]]
    names = sorted({name for point in points for name in point["scores"]})
    lines = table_header("architecture", *(name.replace("/accuracy", "") for name in names))
    for architecture in dict.fromkeys(point["architecture"] for point in points):
        rows = [point["scores"] for point in points if point["architecture"] == architecture]
        cells = [[row[name] for row in rows if row.get(name) is not None] for name in names]
        lines.append(table_row(architecture, *map(_scores, cells)))
    return "\n".join(lines) + "\n"


def _interval(row: Report, key: str, form: str) -> str:
    value, interval = row[key], row[f"{key}_interval"]
    if value is None:
        return ""
    return f"{value:{form}}" + ("" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})")


def _scores(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{mean(values):.2f} ({' '.join(f'{value:.2f}' for value in values)})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
