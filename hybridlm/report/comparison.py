"""Several runs beside one another: curves over steps and over tokens, differing settings, final numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlm.config.schema import Config
from hybridlm.config.serialization import to_dict
from hybridlm.errors import ConfigError
from hybridlm.model.cost import count_parameters
from hybridlm.report.figures import Axis, Chart, Figure, Panel, Series, Table, averaged, number, thinned
from hybridlm.report.palette import Palette
from hybridlm.report.read import Curve, Run, Sweep, check_metrics, read
from hybridlm.training.run_changes import flatten

LAST_STEPS = 20  # over which the final training loss is averaged
FOLDER_KEYS = ("run_dir", "data.cache_dir", "tracking.run_name")  # where a run is kept, which is not what it does
ABSENT = "-"
STEP, TOKENS = Axis("step"), Axis("tokens", "count")


@dataclass
class Comparison:
    """Runs that are compared, with names that differ."""

    runs: list[Run]
    names: list[str]

    @property
    def name(self) -> str:
        return ", ".join(self.names)

    def pairs(self) -> list[tuple[str, Run]]:
        """Return each run with its name."""
        return list(zip(self.names, self.runs, strict=True))


def read_comparison(paths: Sequence[str | Path], metrics: Sequence[str] = ()) -> Comparison:
    """Read run folders that are to be compared; `metrics` are asked for beside the usual ones.

    Raises:
        ConfigError: a folder that is no run, that stands there twice, or a metric that no run has.
    """
    runs: list[Run] = []
    for path in paths:
        run = read(path)
        if isinstance(run, Sweep):
            raise ConfigError("report", "is a sweep, which is not compared with others", got=str(path),
                              expected="run folders", hint="its points are runs: " + str(Path(path) / "points"))
        if any(run.folder.resolve() == other.folder.resolve() for other in runs):
            raise ConfigError("report", "stands there twice", got=str(path), expected="different runs")
        runs.append(run)
    check_metrics(list(metrics), {name for run in runs for name in run.curves})
    return Comparison(runs, _names([run.folder.resolve() for run in runs]))


def _names(folders: list[Path]) -> list[str]:
    """Name each folder by as many of its last parts as tell it from the others."""
    for parts in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def final_numbers(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the last numbers of each run by name; None where a run has none.

    `loss` is the mean over the last steps, because that of a single step says little.
    """
    rows = []
    for name, run in comparison.pairs():
        losses = run.curves.get("loss", ([], []))[1][-LAST_STEPS:]
        speeds, memory = (run.curves.get(key, ([], []))[1] for key in ("tokens_per_second", "peak_memory_bytes"))
        row: dict[str, Any] = {"name": name, "folder": str(run.folder), "parameters": None, "active_parameters": None}
        if run.config is not None:
            try:
                counts = count_parameters(run.config.model)
                row |= {"parameters": counts.total_with_mtp, "active_parameters": counts.active_with_head}
            except ConfigError:
                pass  # a model of another version: its numbers stay
        rows.append(row | {
            "steps": run.steps, "tokens": run.last("tokens"), "epochs": run.last("epochs"),
            "loss": statistics.fmean(losses) if losses else None,
            **{key: run.last(key) for key in ("validation_loss", "validation_perplexity",
                                              "validation_bits_per_byte", "grad_norm", "lr", "skipped_steps")},
            "tokens_per_second": statistics.median(speeds) if speeds else None,
            "peak_memory_bytes": max(memory) if memory else None, "seconds": run.last("seconds")})
    return rows


def config_differences(comparison: Comparison) -> dict[str, list[Any]]:
    """Return the settings in which the configs differ: their values by dotted key, in the order of the runs.

    A run that lacks a setting has "-". Runs whose config cannot be read are left out with "-" throughout.
    """
    flat = [_flat_config(run.config) if run.config is not None else None for run in comparison.runs]
    read_ones = [values for values in flat if values is not None]
    keys = dict.fromkeys(key for values in read_ones for key in values)
    return {key: [ABSENT if values is None else values.get(key, ABSENT) for values in flat]
            for key in keys if key not in FOLDER_KEYS
            and any(values.get(key, ABSENT) != read_ones[0].get(key, ABSENT) for values in read_ones)}


def _flat_config(config: Config) -> dict[str, Any]:
    """Flatten a config to {dotted key: value}; a mixture is one value, a short text."""
    values = to_dict(config)
    sources = values["data"].pop("mixture")
    if sources:
        values["data"]["mixture"] = "; ".join(
            " ".join(f"{key}={value}" for key, value in source.options().items()) for source in config.data.mixture)
    return flatten(values)


def tables(final: list[dict[str, Any]], differences: dict[str, list[Any]]) -> list[tuple[str, Table]]:
    """Make tables, with a column for each run, of what `final_numbers` and `config_differences` return."""
    names = [row["name"] for row in final]
    shown = [key for key in final[0] if key not in ("name", "folder") and any(row[key] is not None for row in final)]
    rows = [[key.replace("_", " "), *(number(row[key], "bytes" if key.endswith("_bytes") else "number")
                                      for row in final)] for key in shown]
    made = [("Final numbers", Table(["", *names], rows, f"loss: mean of the last {LAST_STEPS} steps; speed: median"))]
    if differences:
        made.append(("Differences of the configs", Table(["setting", *names], _difference_rows(differences))))
    return made


def _difference_rows(differences: dict[str, list[Any]]) -> list[list[str]]:
    """Make the rows of the differing settings: a mixer that some runs lack and the others share is one row."""
    sections: dict[str, list[str]] = {}  # a mixer, or a setting by itself
    for key in differences:
        sections.setdefault(_mixer_of(key) or key, []).append(key)
    rows = []
    for section, keys in sections.items():
        columns = list(zip(*(differences[key] for key in keys), strict=True))
        theirs = [column for column in columns if set(column) != {ABSENT}]
        if section not in keys and len(theirs) < len(columns) and all(column == theirs[0] for column in theirs):
            rows.append([section, *(_section_text(section, keys, column) for column in columns)])
        else:
            rows += [[key, *map(_plain, differences[key])] for key in keys]
    return rows


def _mixer_of(key: str) -> str:
    """The part of a dotted key that names a mixer of the model; empty for other settings."""
    parts = key.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "mixers"] and len(parts) > 3 else ""


def _section_text(section: str, keys: list[str], values: Sequence[Any]) -> str:
    """Format the settings of a section in a few words: its first ones that are set."""
    found = [f"{key.removeprefix(section + '.')}={_plain(value)}" for key, value in zip(keys, values, strict=True)
             if value != ABSENT and value is not None]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return " ".join(found[:3]) + more if found else ABSENT


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def comparison_figures(comparison: Comparison, metrics: Sequence[str] = ()) -> tuple[list[Figure], list[str]]:
    """Draw the curves of all runs in common figures; returns them and the names of those that lack data."""
    palette = Palette(comparison.names)
    figures: list[Figure] = []
    missing: list[str] = []
    wanted = [("loss", "Training loss", Axis("loss")), ("validation_loss", "Validation loss", Axis("loss"))]
    for metric, title, y in wanted:
        for over, x in (("steps", STEP), ("tokens", TOKENS)):
            _add(figures, missing, _chart(comparison, palette, metric, f"{title} over {over}", x, y))
    for metric, title, y in (("lr", "Learning rate", Axis("learning rate")),
                             ("grad_norm", "Norm of the gradient", Axis("norm before clipping", log=True)),
                             ("tokens_per_second", "Speed", Axis("tokens/s", "count"))):
        _add(figures, missing, _chart(comparison, palette, metric, title, STEP, y))
    for metric in metrics:
        _add(figures, missing, _chart(comparison, palette, metric, metric, STEP, Axis(metric)))
    return figures, missing


def _add(figures: list[Figure], missing: list[str], chart: Chart) -> None:
    if chart.panels[0].series:
        figures.append(chart)
    else:
        missing.append(chart.title.lower())


def _chart(comparison: Comparison, palette: Palette, metric: str, title: str, x: Axis, y: Axis) -> Chart:
    series, most = [], 1
    for name, run in comparison.pairs():
        curve = run.curves.get(metric)
        places = None if curve is None else _places(run, curve, x)
        if curve is None or places is None:
            continue
        xs, values, n = thinned(places, curve[1])
        sparse = metric.startswith("validation") or len(xs) == 1
        series.append(Series(name, palette[name], xs, values, points=sparse))
        most = max(most, n)
    id = f"{metric.replace('/', '-')}-{'tokens' if x is TOKENS else 'steps'}"
    return Chart(id, title, averaged(most).strip(), x, y, [Panel("", series)])


def _places(run: Run, curve: Curve, x: Axis) -> Sequence[float] | None:
    """Return the places of a curve's values on the axis; None where the run did not record tokens."""
    if x is not TOKENS:
        return curve[0]
    steps, tokens = run.curves.get("tokens", ([], []))
    by_step = dict(zip(steps, tokens, strict=True))
    return [by_step[step] for step in curve[0]] if all(step in by_step for step in curve[0]) else None
