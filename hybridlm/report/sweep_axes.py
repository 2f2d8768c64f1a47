"""Places of a sweep's points in its figures: along the axis, and on one of the lines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hybridlm.report.palette import MIXERS, Palette, Style
from hybridlm.report.read import PointResults, Sweep
from hybridlm.sweep.point import SEED_KEY, shorten_keys

RATIO, LINEAR, FULL = "model.schedule.ratio", "model.schedule.linear", "model.schedule.full"
ONLY_LINE = "all points"  # name of a line that needs no name
RATIO_TITLE = "linear layers for each full one"


@dataclass(frozen=True)
class AxisPlace:
    """The line of a setting and its place along the axis, both as texts."""

    line: str
    x: str


@dataclass
class Group:
    """Points that differ in their seed alone.

    One run may lie in several places: at ratio 0 it is the first point of every mixer's line. `mixer` selects
    the colour.
    """

    name: str
    mixer: str
    places: list[AxisPlace]
    points: list[PointResults]

    def values(self, metric: str) -> list[float]:
        """The metric of all seeds that have it."""
        return [point.row["metrics"][metric] for point in self.points if metric in point.row["metrics"]]

    def accuracies(self, label: str, length: int | None = None) -> list[float]:
        """Accuracies of all seeds at a length, by default that of training."""
        probes = [point.probes[label] for point in self.points if label in point.probes]
        found = [probe.accuracy.get(probe.length if length is None else length) for probe in probes]
        return [value for value in found if value is not None]


class Axes:
    """The groups of a sweep, the places along its axis and the lines, each with a style."""

    def __init__(self, sweep: Sweep):
        vary = {key: [str(value) for value in values] for key, values in sweep.results["vary"].items()
                if key != SEED_KEY}
        self.key = RATIO if RATIO in vary else next((key for key in vary if _numbers(vary[key])), next(iter(vary), ""))
        self.others = [key for key in vary if key != self.key]
        self._short = shorten_keys(self.others)
        self.title = RATIO_TITLE if self.key == RATIO else self.key
        self.groups = self._groups(sweep.points)
        places = [place for group in self.groups for place in group.places]
        known = [self._x(value) for value in vary.get(self.key, [])]
        used = list(dict.fromkeys(place.x for place in places))
        self.x = tuple([x for x in known if x in used] + [x for x in used if x not in known])
        self.lines = list(dict.fromkeys(place.line for place in places))
        mixers = {place.line: group.mixer for group in reversed(self.groups) for place in group.places
                  if len(group.places) == 1}
        names = {line: line if line in MIXERS else mixers.get(line, line) for line in self.lines}
        if len(set(names.values())) < len(self.lines):  # lines that differ in something else than the mixer
            names = {line: line for line in self.lines}
        palette = Palette([*names.values(), *(group.mixer for group in self.groups)])
        self._styles = {line: palette[names[line]] for line in self.lines}
        self._mixers = {group.mixer: palette[group.mixer] for group in self.groups}

    def at(self, line: str, x: str) -> Group:
        """The group at a place; one without points if there is none."""
        place = AxisPlace(line, x)
        return next((group for group in self.groups if place in group.places), Group(line, line, [place], []))

    def style(self, line: str) -> Style:
        """The style of a line."""
        return self._styles[line]

    def mixer_style(self, mixer: str) -> Style:
        """The style of a mixer's points."""
        return self._mixers[mixer]

    def _groups(self, points: list[PointResults]) -> list[Group]:
        groups: dict[str, Group] = {}
        config = points[0].run.config
        full = (config and config.model.schedule.full) or "full"
        for point in points:
            settings = [{key: value for key, value in each.items() if key != SEED_KEY}
                        for each in point.row["same_as"] or [point.row["settings"]]]
            every = [AxisPlace(self._line(each), self._x(each.get(self.key, ""))) for each in settings]
            places = list(dict.fromkeys(every))
            key = repr(places)
            mixer = mixer_of(point, full)
            name = self._name(mixer, places)
            groups.setdefault(key, Group(name, mixer, places, [])).points.append(point)
        return list(groups.values())

    def _name(self, mixer: str, places: list[AxisPlace]) -> str:
        """A name such as kda 3:1, kda only or full; or the mixer, the line and the place."""
        distinct = {place.x for place in places}
        line = [places[0].line] if len(places) == 1 and places[0].line != ONLY_LINE else []
        if self.key != RATIO:
            return ", ".join(dict.fromkeys([mixer, *line, *sorted(distinct)]))
        ends = {"0": "", "∞": " only"}
        last = places[-1].x
        return ", ".join(dict.fromkeys([mixer, *line])) + ends.get(last, f" {last}:1")

    def _line(self, settings: dict[str, Any]) -> str:
        """The name of a line, such as `kda` or `kda, lr 0.001`: the mixer, and other settings with their keys."""
        parts = [str(settings[key]) if key == LINEAR else f"{self._short[key]} {settings[key]}"
                 for key in self.others if key in settings]
        return ", ".join(parts) or ONLY_LINE

    def _x(self, value: Any) -> str:
        return "∞" if self.key == RATIO and str(value) == "inf" else str(value)


def mixer_of(point: PointResults, full: str) -> str:
    """Name the mixers of a model but the full one, which is named only where it stands alone."""
    layers = [str(layer) for layer in point.row["layers"]]
    full = str(point.row["settings"].get(FULL, full))
    return "+".join(name for name in dict.fromkeys(layers) if name != full) or layers[0]


def _numbers(values: Iterable[str]) -> bool:
    try:
        return bool([float(value) for value in values])
    except ValueError:
        return False
