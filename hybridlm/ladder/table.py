"""Tables of a ladder on the console: before it runs, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hybridlm.inspect import BYTES, COUNTS, scaled
from hybridlm.ladder.pilot_report import PilotReport
from hybridlm.ladder.plan import ARCHITECTURE_KEY, RUNG_KEY
from hybridlm.sweep.table import format_layers
from hybridlm.training.display import format_duration


def print_ladder_plan(shown: dict[str, Any], console: Console) -> None:
    """Print rungs and architectures with their costs before anything runs.

    Args:
        shown: of `describe_with_times`, with the ladder under `ladder`.
        console: where to.
    """
    costs = shown["ladder"]["costs"]
    table = _table("rung", "architecture", "N", "D", "FLOPs/\ntoken", "C", "steps", "lr", "state", "seeds", "time")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in shown["points"]:
        groups.setdefault((row["settings"][RUNG_KEY], row["settings"][ARCHITECTURE_KEY]), []).append(row)
    rung_before = None
    for (rung, name), rows in groups.items():
        cost = costs[rows[0]["point"]]
        seconds = sum(row["estimated_seconds"] for row in rows)
        table.add_row("" if rung == rung_before else rung, name, _count(cost["parameters"]), _count(cost["tokens"]),
                      _count(cost["flops_per_token"]), f"{cost['compute']:.2e}", f"{cost['steps']:,}",
                      f"{cost['lr']:.2e}",
                      scaled(cost["state_bytes"], 1024, BYTES), str(len(rows)), format_duration(seconds))
        rung_before = rung
    console.print(table)
    total = sum(costs[row["point"]]["compute"] for row in shown["points"])
    done = sum(row["status"] == "finished" for row in shown["points"])
    layers = {name: format_layers(rows[0]["layers"]) for (_, name), rows in groups.items()}
    console.print("layers at the largest rung: " + "; ".join(f"{name} {text}" for name, text in layers.items()),
                  highlight=False)
    for note in shown["notes"]:
        console.print(note, highlight=False)
    context = shown["ladder"]["settings"]["state_context"]
    console.print(f"N without embedding and head, per token; state at {context:,} tokens; {total:.3g} FLOPs in all",
                  highlight=False)
    console.print(f"time: {format_duration(shown['estimated_seconds'])} for what is left, {shown['jobs']} at a time "
                  f"({done} of {len(shown['points'])} points finished); {shown['estimated_by']}", highlight=False)


def print_ladder(report: dict[str, Any], console: Console) -> None:
    """Print results, laws, projections and verdicts.

    Args:
        report: of `analyse`.
        console: where to.
    """
    _print_cells(report, console)
    if report["law"] is not None:
        _print_laws(report, console)
    if any(report["projections"].values()):
        _print_projections(report, console)
    for verdict in report["verdicts"]:
        console.print(f"[bold]{verdict['architecture']} {verdict['verdict']}[/bold]: {verdict['reason']}",
                      highlight=False)
    for warning in report["warnings"]:
        console.print(f"note: {warning}", highlight=False, markup=False)
    for missing in report["missing"]:
        console.print(f"without a result: {missing}", highlight=False, markup=False)


def print_pilot(report: PilotReport, console: Console) -> None:
    """Print the losses of all learning rates, and the best of each architecture.

    Args:
        report: of `judge_pilot`, of the architectures of the ladder alone.
        console: where to.
    """
    table = _table("architecture", "learning rate", "bits per\nbyte", "by seed", "")
    for name, found in report.architectures.items():
        for index, row in enumerate(found.rates):
            said = "diverged" if row.diverged else "best" if row.lr == found.best else ""
            table.add_row("" if index else name, f"{row.lr:g}", _number(row.loss, ".4f"),
                          " ".join(f"{loss:.3f}" for loss in row.losses) or "-", said)
    console.print(table)
    for warning in report.warnings:
        console.print(f"note: {warning}", highlight=False, markup=False)
    for missing in report.missing:
        console.print(f"without a result: {missing}", highlight=False, markup=False)
    usable = not report.missing and not report.untuned
    said = "the rungs of this ladder train with the best rates" if usable else \
        "the ladder does not train before every architecture has a best rate"
    console.print(f"at rung {report.rung.name}; {said} (ladder.pilot.use=false: with optimizer.lr)", highlight=False)


def _print_cells(report: dict[str, Any], console: Console) -> None:
    """Print losses beside the reference, then costs and speeds."""
    compared = {(name, each["rung"]): each for name, rows in report["comparisons"].items() for each in rows}
    losses = _table("rung", "architecture", "bits per\nbyte", "by seed", "difference", "compute\ngain")
    costs = _table("rung", "architecture", "N", "D", "C", "tokens/s", "FLOP/s", "speed-up", "state",
                   "ms per\ndecoded token")
    rung_before = None
    for cell in report["cells"]:
        each = compared.get((cell["architecture"], cell["rung"]), {})
        place = ["" if cell["rung"] == rung_before else cell["rung"], cell["architecture"]]
        losses.add_row(*place, _number(cell["mean"], ".4f"),
                       " ".join(f"{loss:.3f}" for loss in cell["losses"].values()) or "-",
                       _plus_minus(each.get("difference"), each.get("difference_interval")),
                       _with_interval(each.get("gain"), each.get("gain_interval"), ".3g"))
        costs.add_row(*place, _count(cell["parameters"]), _count(cell["tokens"]), f"{cell['compute']:.2e}",
                      _number(cell["tokens_per_second"], ",.0f"),
                      "-" if cell["flops_per_second"] is None else _count(cell["flops_per_second"]),
                      _number(each.get("speed_up"), ".3g"), scaled(cell["state_bytes"], 1024, BYTES),
                      _number(cell["decode_milliseconds_per_token"], ".3g"))
        rung_before = cell["rung"]
    console.print(losses)
    console.print(costs)
    settings = report["ladder"]
    decoded = "" if settings["decode_context"] is None else (
        f"; milliseconds per decoded token of one sequence behind {settings['decode_context']:,} tokens, in fp32, "
        "after each training")
    console.print(f"state at {settings['state_context']:,} tokens{decoded}", highlight=False)


def _print_laws(report: dict[str, Any], console: Console) -> None:
    law = report["law"]
    table = _table("law", "E", "A", "a", "gain in all", "without one rung each")
    for name, found in law["laws"].items():
        gain = report["gains"].get(name) or {}
        without = " ".join(f"{rung}: {value:.3g}" for rung, value in gain.get("without_rung", {}).items())
        table.add_row(name, _with_interval(found["asymptote"], found["asymptote_interval"], ".4g"),
                      f"{found['coefficient']:.5g}",
                      _with_interval(found["exponent"], found["exponent_interval"], ".4g"),
                      _with_interval(gain.get("gain"), gain.get("interval"), ".3g"), without or "-")
    console.print(table)
    worst = max(law["residuals"], key=lambda each: abs(each["residual"]))
    console.print(f"L = E + A C^-a, {law['form']}; largest residual {worst['residual']:+.2%} ({worst['architecture']}, "
                  f"{worst['rung']}, seed {worst['seed']})", highlight=False)


def _print_projections(report: dict[str, Any], console: Console) -> None:
    table = _table("projected to FLOPs", "architecture", "bits per byte", "reference", "difference")
    for name, rows in report["projections"].items():
        for each in rows:
            table.add_row(f"{each['compute']:.3g}", name, f"{each['loss']:.4f}", f"{each['reference_loss']:.4f}",
                          _with_interval(each["difference"], each["interval"], "+.4f"))
    console.print(table)


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        left = title in ("rung", "architecture", "layers", "by seed") or title.startswith(("law", "projected"))
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    return table


def _count(value: float) -> str:
    return scaled(value, 1000, COUNTS)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plus_minus(value: float | None, interval: Sequence[float] | None) -> str:
    """A difference with half the width of its interval, such as "-0.0123 ± 0.0027"."""
    if value is None or interval is None:
        return _number(value, "+.4f")
    return f"{value:+.4f} ± {(interval[1] - interval[0]) / 2:.4f}"


def _with_interval(value: float | None, interval: Sequence[float | None] | None, form: str) -> str:
    """A value with its interval, such as "-0.0123 (-0.0150 to -0.0096)"."""
    if value is None:
        return "-"
    if interval is None:
        return format(value, form)
    low, high = ("inf" if end is None else format(end, form) for end in interval)
    return f"{format(value, form)} ({low} to {high})"
