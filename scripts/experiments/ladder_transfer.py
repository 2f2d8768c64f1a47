"""Tabulates and draws what the experiment of transfer found: losses by learning rate and width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sweep_tables import table_header, table_row  # the file beside this one

from hybridlm.ladder.pilot_report import PilotReport
from hybridlm.report.figures import Axis, Chart, Panel, Series
from hybridlm.report.palette import Palette
from hybridlm.report.png import write_png

Pilots = Mapping[tuple[str, int], PilotReport]  # by parametrization and width
ARCHITECTURES = ("full", "kda")


def tabulate_transfer(pilots: Pilots) -> str:
    """Losses in bits per byte by learning rate, for every parametrization, architecture and width.

    Rates are those of the narrowest model, so a rate that is carried to a wide one is the same number. The best rate
    should stay under mup and move under standard.

    Args:
        pilots: those that have begun.
    """
    rates = sorted({row.lr for pilot in pilots.values() for each in pilot.architectures.values() for row in each.rates})
    lines = table_header("parametrization", "architecture", "width", *(f"{rate:g}" for rate in rates), "best")
    for name in ARCHITECTURES:
        for (kind, width), pilot in pilots.items():
            found = pilot.architectures[name]
            losses = {row.lr: row.loss for row in found.rates}
            cells = ["-" if losses.get(rate) is None else f"{losses[rate]:.3f}" for rate in rates]
            cells = [f"**{cell}**" if rate == found.best else cell for rate, cell in zip(rates, cells, strict=True)]
            best = "-" if found.best is None else f"{found.best:g}"
            lines.append(table_row(kind, name, str(width), *cells, best))
    return "\n".join(lines) + "\n"


def draw_transfer(pilots: Pilots, file: Path) -> None:
    """Draw the losses over the learning rate, a panel per parametrization and architecture, a line per width.

    Args:
        pilots: those that have begun.
        file: PNG to write.
    """
    palette = Palette(str(width) for _, width in pilots)
    panels = []
    for name in ARCHITECTURES:
        for kind in dict.fromkeys(kind for kind, _ in pilots):
            series = []
            for (other, width), pilot in pilots.items():
                rows = [row for row in pilot.architectures[name].rates if row.loss is not None]
                if other == kind and rows:
                    series.append(Series(str(width), palette[str(width)], [row.lr for row in rows],
                                         [row.loss for row in rows], points=True))
            panels.append(Panel(f"{name}, {kind}", series))
    write_png(Chart("transfer", "Loss over the learning rate, by width", "", Axis("learning rate", log=True),
                    Axis("bits per byte"), panels), file)
