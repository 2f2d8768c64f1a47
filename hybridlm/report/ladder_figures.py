"""Figures and tables of a ladder: losses over compute, differences to the reference, speed-up, probes, coordinates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.errors import ConfigError
from hybridlm.inspect import COUNTS, scaled
from hybridlm.ladder.analysis import RESULT_FILE
from hybridlm.ladder.coordinate_report import CONTROL
from hybridlm.ladder.law import Law
from hybridlm.ladder.plan import COORDINATES_FILE
from hybridlm.report.figures import Axis, Chart, Figure, Panel, Series, Table, Value, number
from hybridlm.report.palette import Palette, Style

COMPUTE = Axis("training FLOPs", log=True)
LINE_POINTS = 40  # of a law


def read_report(folder: Path) -> dict[str, Any]:
    """Read ladder.json, the analysis of a ladder.

    Args:
        folder: of the ladder.

    Raises:
        ConfigError: there is none yet, or it cannot be read.
    """
    try:
        return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError("report", f"holds a ladder without {RESULT_FILE}", got=str(folder),
                          hint=f"hybridlm ladder ladder.dir={folder} --fit-only") from None


def ladder_figures(folder: Path) -> list[Figure]:
    """Draw the figures for which a ladder has data.

    Args:
        folder: of the ladder.
    """
    report = read_report(folder)
    names = list(dict.fromkeys(cell["architecture"] for cell in report["cells"]))
    palette = Palette(names)
    figures: list[Figure | None] = [
        _loss_figure(report, names, palette), _difference_figure(report, palette), _residual_figure(report, palette),
        _speed_figure(report, palette), _probe_figure(report, names, palette), _coordinate_figure(folder)]
    return [figure for figure in figures if figure is not None]


def _computes(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(cell["architecture"], cell["rung"]): cell["compute"] for cell in report["cells"]}


def _loss_figure(report: dict[str, Any], names: list[str], palette: Palette) -> Chart | None:
    """Every run as a point, and the law of each architecture as a line, as far as it was projected."""
    series = []
    for name in names:
        rows = [row for row in report["points"] if row["architecture"] == name and row["loss"] is not None]
        if rows:
            series.append(Series(name, palette[name], [row["compute"] for row in rows], [row["loss"] for row in rows],
                                 line=False, points=True))
    if not series:
        return None
    if report["law"] is not None:
        computes = [row["compute"] for row in report["points"] if row["loss"] is not None]
        far = max([*computes, *report["ladder"]["gate"]["project"]])
        x = [float(value) for value in np.geomspace(min(computes), far, LINE_POINTS)]
        for name, found in report["law"]["laws"].items():
            law = Law(found["asymptote"], found["coefficient"], found["exponent"])
            series.append(Series(name, Style(palette[name].colour, dash="dot"), x, [law.loss(value) for value in x],
                                 tabled=False))
    return Chart("loss-over-compute", "Loss over compute", "Every run is a point. Dotted lines are the fitted laws.",
                 COMPUTE, Axis("bits per byte", log=True), [Panel("", series)], wide=True)


def _difference_figure(report: dict[str, Any], palette: Palette) -> Chart | None:
    """The figure to read: paired differences with their intervals."""
    computes = _computes(report)
    series = []
    for name, rows in report["comparisons"].items():
        ends = [row["difference_interval"] or [None, None] for row in rows]
        series.append(Series(name, palette[name], [computes[name, row["rung"]] for row in rows],
                             [row["difference"] for row in rows], [low for low, _ in ends], [high for _, high in ends],
                             "range", points=True))
    if not series:
        return None
    settings = report["ladder"]
    reference = settings["reference"] or next(iter(settings["architectures"]))
    note = (f"Bits per byte minus those of {reference}, paired by seed; below 0 is better. Shades are "
            f"{100 * settings['gate']['level']:.0f} % intervals, the spread pooled over rungs.")
    return Chart("differences", "Difference to the reference", note, COMPUTE, Axis("difference"),
                 [Panel("", series, (0.0, reference))], wide=True)


def _residual_figure(report: dict[str, Any], palette: Palette) -> Chart | None:
    if report["law"] is None:
        return None
    found: dict[str, tuple[list[Value], list[Value]]] = {}
    for each in report["law"]["residuals"]:
        x, y = found.setdefault(each["architecture"], ([], []))
        x.append(each["compute"])
        y.append(100 * each["residual"])
    series = [Series(name, palette[name], x, y, line=False, points=True) for name, (x, y) in found.items()]
    note = "Measured over fitted loss, less one. A trend says that the form does not fit."
    return Chart("residuals", "Residuals of the laws", note, COMPUTE, Axis("percent"),
                 [Panel("", series, (0.0, "law"))])


def _speed_figure(report: dict[str, Any], palette: Palette) -> Chart | None:
    computes = _computes(report)
    panels = []
    for key, title in (("gain", "compute gain"), ("speed_up", "effective speed-up")):
        series = []
        for name, rows in report["comparisons"].items():
            known = [row for row in rows if row[key] is not None]
            ends = [row[f"{key}_interval"] or [None, None] for row in known]
            if known:
                series.append(Series(name, palette[name], [computes[name, row["rung"]] for row in known],
                                     [row[key] for row in known], [low for low, _ in ends], [high for _, high in ends],
                                     "range", points=True))
        if series:
            panels.append(Panel(title, series, (1.0, "reference")))
    if not panels:
        return None
    note = ("Compute gain: FLOPs that the reference needs for the same loss, over those of the architecture. Speed-up: "
            "the same in time, by tokens/s of these runs.")
    return Chart("speed-up", "Compute gain and speed-up", note, COMPUTE, Axis("times"), panels)


def _probe_figure(report: dict[str, Any], names: list[str], palette: Palette) -> Chart | None:
    """All scores of every seed: they have two humps, so that a mean says little."""
    probes = list(dict.fromkeys(score for row in report["points"] for score in row["scores"]))
    panels = []
    for probe in probes:
        series = []
        for name in names:
            values = [row["scores"][probe] for row in report["points"]
                      if row["architecture"] == name and probe in row["scores"]]
            if values:
                series.append(Series(name, palette[name], [name] * len(values), values, line=False, points=True))
        panels.append(Panel(probe.replace("/accuracy", ""), series))
    if not panels:
        return None
    return Chart("probes", "Probes at the largest rung", "Share of the asked tokens that are right, a point per seed.",
                 Axis("architecture", categories=tuple(names)), Axis("accuracy", "share"), panels,
                 numbers=_probe_table(report, names, probes))


def _probe_table(report: dict[str, Any], names: list[str], probes: list[str]) -> Table:
    rows = []
    for name in names:
        own = [row for row in report["points"] if row["architecture"] == name]
        cells = [", ".join(f"{row['scores'][probe]:.2f}" for row in own if probe in row["scores"]) for probe in probes]
        rows.append([name, *cells])
    return Table(["architecture", *probes], rows)


def _coordinate_figure(folder: Path) -> Chart | None:
    """Sizes of changes over the width at the last step, a line per activation, under both parametrizations."""
    try:
        report = json.loads((folder / COORDINATES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kinds = (report["parametrization"], CONTROL)
    chosen = {name: {kind: [row for row in found[kind]["coordinates"]
                            if row["quantity"] == "change" and row["step"] == report["steps"]] for kind in kinds}
              for name, found in report["architectures"].items()}
    activations = list(dict.fromkeys(row["name"] for found in chosen.values() for row in found[kinds[0]]))
    palette = Palette(activations)
    panels = [Panel(f"{name}, {kind}", [Series(row["name"], palette[row["name"]], [int(width) for width in row["rms"]],
                                               list(row["rms"].values())) for row in found[kind]])
              for name, found in chosen.items() for kind in kinds]
    note = (f"Root mean square of the change of every activation after {report['steps']} steps. Flat is right; under "
            f"{CONTROL} they must grow.")
    return Chart("coordinates", "Coordinate check", note, Axis("hidden size", log=True), Axis("change", log=True),
                 panels)


def ladder_facts(folder: Path) -> list[tuple[str, str]]:
    """Facts for the top of a page: the ladder, and the verdict on each architecture.

    Args:
        folder: of the ladder.
    """
    report = read_report(folder)
    settings = report["ladder"]
    finished = sum(row["loss"] is not None for row in report["points"])
    facts = [("architectures", ", ".join(settings["architectures"])),
             ("rungs", ", ".join(dict.fromkeys(cell["rung"] for cell in report["cells"]))),
             ("seeds", ", ".join(map(str, settings["seeds"]))), ("parametrization", settings["parametrization"]),
             ("points", f"{finished} of {len(report['points'])}")]
    return facts + [(verdict["architecture"], verdict["verdict"]) for verdict in report["verdicts"]]


def ladder_tables(folder: Path) -> list[tuple[str, Table]]:
    """Tables of verdicts, results, laws and projections.

    Args:
        folder: of the ladder.
    """
    report = read_report(folder)
    compared = {(name, row["rung"]): row for name, rows in report["comparisons"].items() for row in rows}
    rows = []
    for cell in report["cells"]:
        each = compared.get((cell["architecture"], cell["rung"]), {})
        rows.append([cell["rung"], cell["architecture"], _count(cell["parameters"]), _count(cell["tokens"]),
                     f"{cell['compute']:.2e}", _count(cell["flops_per_token"]), f"{cell['steps']:,}",
                     f"{cell['lr']:.2e}", number(cell["mean"]), ", ".join(map(number, cell["losses"].values())),
                     _spread(each.get("difference"), each.get("difference_interval")), number(each.get("gain")),
                     number(cell["tokens_per_second"]), number(each.get("speed_up")),
                     number(cell["state_bytes"], "bytes"), number(cell.get("decode_milliseconds_per_token"))])
    tables = [("Verdicts", Table(["architecture", "verdict", "reason"],
                                 [[v["architecture"], v["verdict"], v["reason"]] for v in report["verdicts"]])),
              ("Results", Table(["rung", "architecture", "N", "D", "C", "FLOPs/token", "steps", "lr", "bits per byte",
                                 "by seed", "difference", "gain", "tokens/s", "speed-up", "state",
                                 "ms per decoded token"], rows))]
    if report["law"] is not None:
        laws = [[name, number(found["asymptote"]), number(found["coefficient"]), number(found["exponent"]),
                 _spread(found["exponent"], found["exponent_interval"])]
                for name, found in report["law"]["laws"].items()]
        tables.append(("Laws", Table(["L = E + A C^-a", "E", "A", "a", "interval of a"], laws)))
    projected = [[f"{row['compute']:.3g}", name, number(row["loss"]), number(row["reference_loss"]),
                  _spread(row["difference"], row["interval"])]
                 for name, found in report["projections"].items() for row in found]
    if report.get("pilot"):
        tables.append(("Learning rates of the pilot", _pilot_table(report["pilot"])))
    if projected:
        tables.append(("Projections", Table(["FLOPs", "architecture", "bits per byte", "reference", "difference"],
                                            projected)))
    return tables


def _pilot_table(pilot: dict[str, Any]) -> Table:
    rows = [[name, f"{row['lr']:g}", "diverged" if row["diverged"] else number(row["loss"]),
             "best" * (row["lr"] == found["best"])]
            for name, found in pilot["architectures"].items() for row in found["rates"]]
    return Table(["architecture", "learning rate", "bits per byte", ""], rows, f"at rung {pilot['rung']['name']}")


def ladder_notes(folder: Path) -> list[str]:
    """Warnings of the analysis, and points without a result.

    Args:
        folder: of the ladder.
    """
    report = read_report(folder)
    return [*report["warnings"], *(f"without a result: {each}" for each in report["missing"])]


def _count(value: float) -> str:
    return scaled(value, 1000, COUNTS)


def _spread(value: float | None, interval: list[float | None] | None) -> str:
    if value is None or interval is None:
        return number(value)
    return f"{number(value)} ({number(interval[0])} to {number(interval[1])})"
