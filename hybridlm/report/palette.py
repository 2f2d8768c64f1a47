"""Colours and symbols. A name looks the same in every figure, page and theme.

Each colour is a pair, for light and for dark ground. Within a theme any two mixers differ by at least 15 in CIELAB for
normal vision and for protanopia, deuteranopia and tritanopia (Machado et al. 2009, severity 1), and stand out from the
ground by a contrast of at least 3 (WCAG 2.2, 1.4.11). The symbol says it once more, without colour.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Pair = tuple[str, str]  # on light ground, on dark ground

GROUND: Pair = ("#ffffff", "#14171c")
INK: Pair = ("#202326", "#f2f2f2")
MUTED: Pair = ("#5f666f", "#a3abb5")
GRID: Pair = ("#e3e6ea", "#2c323a")
ACCENT: Pair = ("#b8174c", "#ff7a9c")

MIXERS: dict[str, Pair] = {
    "full": INK,
    "kda": ("#1068de", "#5177ba"),
    "gdn": ("#802f0d", "#dd6e41"),
    "lightning": ("#3e8b5b", "#5dfc9e"),
    "swa": ("#8b4679", "#a9537a"),
    "deltanet": ("#a49436", "#dedd4d"),
    "mla": ("#079ed4", "#39cef7"),
    "dsa": ("#582a88", "#7358e1"),
}
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "star", "x")


@dataclass(frozen=True)
class Style:
    """The look of a series: `colour` by theme, `symbol` of its points, `dash` of its line."""

    colour: Pair
    symbol: str = "circle"
    dash: str = "solid"


TRAINING = Style(MUTED)
VALIDATION = Style(ACCENT)
LIMIT = Style(INK, dash="dash")


class Palette:
    """Styles of the names on one page.

    Mixers of the presets have fixed styles. Other names get, in their order, the styles that no name of the page has.
    Where there are more names than styles, colours are used again with another symbol.
    """

    def __init__(self, names: Iterable[str]):
        names = list(dict.fromkeys(names))
        fixed = list(MIXERS)
        free = [index for index, name in enumerate(fixed) if name not in names] or list(range(len(fixed)))
        self._styles: dict[str, Style] = {}
        taken = 0
        for name in names:
            if name in MIXERS:
                self._styles[name] = Style(MIXERS[name], SYMBOLS[fixed.index(name)])
                continue
            index, turn = free[taken % len(free)], taken // len(free)
            self._styles[name] = Style(MIXERS[fixed[index]], SYMBOLS[(index + turn) % len(SYMBOLS)])
            taken += 1

    def __getitem__(self, name: str) -> Style:
        return self._styles[name]
