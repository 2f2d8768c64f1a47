"""Figures of a sweep: metrics against the varied setting, and accuracy or loss against the decode state."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from hybridlm.report.figures import (
    Axis,
    Chart,
    Figure,
    Heat,
    Panel,
    Series,
    Table,
    Value,
    averaged,
    number,
    thinned,
)
from hybridlm.report.palette import INK, Style
from hybridlm.report.read import Sweep
from hybridlm.report.run_figures import MAX_VIOLATION_PREFIX, layer_order
from hybridlm.report.sweep_axes import Axes, Group

STATE_CONTEXT = "32768"  # tokens of context at which decode state is shown
MEAN = "mean of all probes"
FRONT = "Nothing on the dotted front can be had better for less memory; its points say their {}."
SPREAD = "Mean over seeds, with their standard deviation."
AGAINST = (
    ("validation_loss", "Validation loss", "Nats per token on held-out text.", Axis("validation loss")),
    ("validation_dsa/indexer_recall", "Indexer recall", "Share of the dense attention on the selected keys.",
     Axis("recall", "share")),
    ("tokens_per_second", "Speed", "Median over the steps of a run.", Axis("tokens/s", "count")),
    ("peak_memory_bytes", "Memory", "The most of a run.", Axis("peak memory", "bytes")),
)


def sweep_figures(sweep: Sweep, axes: Axes, metrics: Sequence[str] = ()) -> tuple[list[Figure], list[str]]:
    """Draw the figures for which a sweep has data; returns them and the names of those that lack data."""
    figures: list[Figure] = []
    missing: list[str] = []
    against = {metric: _against(axes, metric, title, note, y) for metric, title, note, y in AGAINST}
    probes = list(dict.fromkeys(label for point in sweep.points for label in point.probes))
    candidates: list[tuple[Figure | None, str]] = [
        (against["validation_loss"], "validation loss of finished points"), (_pareto_loss(axes), ""),
        (_pareto_probes(axes, probes), ""),
        *((figure, "") for label in probes for figure in (_probe(axes, label), _probe_by_length(axes, label))),
        *([] if probes else [(None, "probes")]),
        (_curves(axes, "loss", "Training loss", "Nats per token, of the next token alone."), "loss curves"),
        (_curves(axes, "validation_loss", "Validation loss over steps", "On held-out text."), "validation curves"),
        (against["tokens_per_second"], "tokens/s"), (against["peak_memory_bytes"], "memory"),
        (_overload(axes), "expert load"), (against["validation_dsa/indexer_recall"], "DSA recall"),
        *((_against(axes, name, name, "", Axis(name), f"metric-{index}"), name) for index, name in enumerate(metrics))]
    for figure, lacking in candidates:
        if figure is not None:
            figures.append(figure)
        elif lacking:
            missing.append(lacking)
    return figures, missing


def _mean_line(axes: Axes, line: str, found: Iterable[tuple[str, list[float]]]) -> list[Series]:
    """A line through the means over seeds at each x, with their standard deviation.

    It has a gap where there are no values, and is left out where there are none at all.
    """
    places = list(found)
    mean = [statistics.fmean(values) if values else None for _, values in places]
    std = [statistics.stdev(values) if len(values) > 1 else None for _, values in places]
    if all(m is None for m in mean):
        return []
    low, high = ([None if m is None or s is None else m + sign * s for m, s in zip(mean, std, strict=True)]
                 for sign in (-1, 1))
    return [Series(line, axes.style(line), [x for x, _ in places], mean, low, high, points=True)]


def _lines(axes: Axes, values: Callable[[Group], list[float]]) -> list[Series]:
    """A line for each setting that is not along the axis."""
    return [series for line in axes.lines
            for series in _mean_line(axes, line, [(x, values(axes.at(line, x))) for x in axes.x])]


def _against(axes: Axes, metric: str, title: str, note: str, y: Axis, id: str | None = None) -> Chart | None:
    series = _lines(axes, lambda group: group.values(metric))
    if not series:
        return None
    return Chart(id or metric.replace("_", "-").replace("/", "-"), title, f"{note} {SPREAD}".strip(),
                 Axis(axes.title, categories=axes.x), y, [Panel("", series)])


def _chance(axes: Axes, label: str) -> tuple[float, str] | None:
    found = {point.probes[label].chance for group in axes.groups for point in group.points if label in point.probes}
    return (found.pop(), "chance") if len(found) == 1 else None


def _lengths(axes: Axes, label: str) -> list[int]:
    return sorted({length for group in axes.groups for point in group.points if label in point.probes
                   for length in point.probes[label].accuracy})


def _trained_at(axes: Axes, label: str) -> str:
    lengths = {point.probes[label].length for group in axes.groups for point in group.points if label in point.probes}
    return f"Trained at {' and '.join(str(length) for length in sorted(lengths))} tokens."


def _probe(axes: Axes, label: str) -> Chart | None:
    """One panel per length, ratios along the axis."""
    panels = []
    for length in _lengths(axes, label):
        series = _lines(axes, lambda group, length=length: group.accuracies(label, length))  # type: ignore[misc]
        panels.append(Panel(f"length {length}", series, _chance(axes, label)))
    if not panels:
        return None
    note = f"Share of the asked tokens that are right. {_trained_at(axes, label)} {SPREAD}"
    return Chart(f"probe-{label}", f"{label}: accuracy", note, Axis(axes.title, categories=axes.x),
                 Axis("accuracy", "share"), panels)


def _probe_by_length(axes: Axes, label: str) -> Chart | None:
    """One panel per ratio, lengths along the axis."""
    lengths = _lengths(axes, label)
    if len(lengths) < 2:
        return None
    panels = []
    for place in axes.x:
        series = [each for line in axes.lines for each in _mean_line(
            axes, line, [(str(length), axes.at(line, place).accuracies(label, length)) for length in lengths])]
        if series:
            panels.append(Panel(_panel_title(axes, place), series, _chance(axes, label)))
    return Chart(f"probe-{label}-length", f"{label}: accuracy by length", f"{_trained_at(axes, label)} {SPREAD}",
                 Axis("length", categories=tuple(str(length) for length in lengths)), Axis("accuracy", "share"), panels)


def _panel_title(axes: Axes, place: str) -> str:
    return f"{axes.key.rsplit('.', 1)[-1]} {place}"


def _pareto_probes(axes: Axes, probes: list[str]) -> Chart | None:
    """One panel per probe, at the length of training; with several probes their mean comes first."""
    panels, rows = [], []
    for label in ([MEAN] if len(probes) > 1 else []) + probes:
        scores = [(group, _mean_accuracy(group, probes if label == MEAN else [label])) for group in axes.groups]
        panel, table = _front_panel(axes, label, [(group, score) for group, score in scores if score is not None],
                                    larger=True)
        panels.append(panel)
        rows += table
    if not rows:
        return None
    note = f"{FRONT.format(axes.key.rsplit('.', 1)[-1])} Probes at the length of training."
    return Chart("pareto", "Accuracy against decode state", note, _state_axis(), Axis("accuracy", "share"), panels,
                 numbers=Table(["probe", "model", "decode state", "accuracy", "on the front"], rows))


def _mean_accuracy(group: Group, labels: list[str]) -> float | None:
    """Mean accuracy over probes and seeds; None where a probe is missing."""
    scores = [group.accuracies(label) for label in labels]
    return statistics.fmean(statistics.fmean(values) for values in scores) if all(scores) else None


def _pareto_loss(axes: Axes) -> Chart | None:
    scores = [(group, statistics.fmean(values)) for group in axes.groups if (values := group.values("validation_loss"))]
    if not scores:
        return None
    panel, rows = _front_panel(axes, "validation loss", scores, larger=False)
    note = f"Lower is better. {FRONT.format(axes.key.rsplit('.', 1)[-1])}"
    return Chart("pareto-loss", "Validation loss against decode state", note, _state_axis(), Axis("validation loss"),
                 [replace(panel, title="")],
                 numbers=Table(["model", "decode state", "loss", "on the front"], [row[1:] for row in rows]))


def _state_axis() -> Axis:
    return Axis(f"decode state at {int(STATE_CONTEXT) // 1024}K tokens", "bytes", log=True)


def _front_panel(axes: Axes, label: str, scores: list[tuple[Group, float]], *,
                 larger: bool) -> tuple[Panel, list[list[str]]]:
    """Points in the colours of their mixers, the front as a line, and the rows of the table."""
    at = [(float(group.points[0].row["decode_state_bytes"][STATE_CONTEXT]), score) for group, score in scores]
    best = front(at, larger=larger)
    ordered = sorted(best, key=lambda index: at[index][0])
    line = Series("front", Style(INK, dash="dot"), [at[i][0] for i in ordered], [at[i][1] for i in ordered],
                  labels=[scores[i][0].places[0].x for i in ordered], steps=True, tabled=False)
    series = []
    for mixer in dict.fromkeys(group.mixer for group, _ in scores):
        chosen = [i for i, (group, _) in enumerate(scores) if group.mixer == mixer]
        series.append(Series(mixer, axes.mixer_style(mixer), [at[i][0] for i in chosen], [at[i][1] for i in chosen],
                             line=False, points=True, labels=[scores[i][0].name for i in chosen]))
    rows = [[label, scores[i][0].name, number(at[i][0], "bytes"), number(at[i][1]), "yes" if i in best else ""]
            for i in sorted(range(len(at)), key=lambda i: (at[i][0], -at[i][1] if larger else at[i][1]))]
    return Panel(label, [line, *series]), rows


def front(points: list[tuple[float, float]], *, larger: bool) -> set[int]:
    """Indices of (cost, score) pairs that no other pair beats: none costs no more and scores better, or costs less and
    scores no worse. `larger`: a larger score is better."""
    sign = 1 if larger else -1

    def beaten(cost: float, score: float) -> bool:
        return any((other <= cost and sign * (reached - score) > 0) or (other < cost and sign * (reached - score) >= 0)
                   for other, reached in points)

    return {index for index, (cost, score) in enumerate(points) if not beaten(cost, score)}


def _curves(axes: Axes, metric: str, title: str, note: str) -> Chart | None:
    """One panel per place along the axis, one line per mixer: the mean over the seeds that reached a step."""
    panels, most = [], 1
    for place in axes.x:
        series = []
        for line in axes.lines:
            curves = [dict(zip(*point.run.curves[metric], strict=True)) for point in axes.at(line, place).points
                      if metric in point.run.curves]
            if curves:
                drawn, n = _mean_curve(line, axes.style(line), curves, points=metric.startswith("validation"))
                series.append(drawn)
                most = max(most, n)
        if series:
            panels.append(Panel(_panel_title(axes, place), series))
    if not panels:
        return None
    seeds = max(len(group.points) for group in axes.groups)
    note += " Mean over seeds, the shade is from the least to the greatest." if seeds > 1 else ""
    return Chart(f"curves-{metric.replace('_', '-')}", title, note + averaged(most), Axis("step"), Axis("loss"), panels)


def _mean_curve(name: str, style: Style, curves: list[dict[int, float]], *, points: bool) -> tuple[Series, int]:
    steps = sorted(set().union(*curves))
    at = [[curve[step] for curve in curves if step in curve] for step in steps]
    x, mean, n = thinned(steps, [statistics.fmean(values) for values in at])
    low: Sequence[Value] = ()
    high: Sequence[Value] = ()
    if len(curves) > 1:
        low, high = (thinned(steps, [end(values) for values in at])[1] for end in (min, max))
    return Series(name, style, x, mean, low, high, "range", points=points), n


def _overload(axes: Axes) -> Heat | None:
    """One row per model, one column per layer."""
    found = {name.removeprefix(MAX_VIOLATION_PREFIX) for group in axes.groups for point in group.points
             for name in point.row["metrics"] if name.startswith(MAX_VIOLATION_PREFIX)}
    if not found:
        return None
    layers = layer_order(list(found))
    z: list[list[Value]] = []
    for group in axes.groups:
        values = [group.values(MAX_VIOLATION_PREFIX + layer) for layer in layers]
        z.append([statistics.fmean(value) if value else None for value in values])
    return Heat("expert-overload", "Expert load over layers", "How much more than the mean the busiest expert of a "
                "layer got, over the last tenth of the steps: 0 is balanced.", Axis("layer"), Axis("model"),
                "max / mean - 1", list(layers), [group.name for group in axes.groups], z)
