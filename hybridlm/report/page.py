"""One HTML page that holds plotly.js, figures and tables, and loads nothing.

All that comes from files is escaped; the page's own policy runs its two scripts, known by their hash, and no other.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from hybridlm.report.document import ReportDocument
from hybridlm.report.figures import Chart, Figure, Heat, Series, Table, legend
from hybridlm.report.palette import GRID, GROUND, INK, MUTED, Pair
from hybridlm.report.plotly_figures import plots

GLYPHS = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "triangle-down": "▼", "cross": "✚",
          "star": "★", "x": "✖"}


def html(document: ReportDocument, plotly_js: str, refresh: int | None = None) -> str:
    """Make the page; after `refresh` seconds it loads itself again."""
    own = files("hybridlm.report")
    script, style = (own.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    drawn = {figure.id: plots(figure) for figure in document.figures}
    data = json.dumps(drawn, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    hashes = " ".join(_hash(text) for text in (plotly_js, script))
    policy = (f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
              "base-uri 'none'; form-action 'none'")
    name = escape(document.name)
    body = "\n".join([
        f"<header><p>{document.kind}</p><h1>{name}</h1>{_facts(document)}{_layers(document)}</header>",
        _contents(document), "<main>", *(_figure(figure) for figure in document.figures), "</main>",
        *(_section(title, _table(table)) for title, table in document.tables),
        *(_section(title, f"<pre>{escape(text)}</pre>", closed=True) for title, text in document.texts),
        "<footer>" + "".join(f"<p>{escape(note)}</p>" for note in document.notes) + "</footer>"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}</title>
<style>:root{{{_variables()}}}
{style}</style>
</head>
<body{f' data-refresh="{refresh}"' if refresh else ""}>
{body}
<script type="application/json" id="figures">{data}</script>
<script>{plotly_js}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _variables() -> str:
    """The ground colours, once for the page and the figures."""
    named: dict[str, Pair] = {"ground": GROUND, "ink": INK, "muted": MUTED, "grid": GRID}
    return "".join(f"--{name}:light-dark({light},{dark});" for name, (light, dark) in named.items())


def _colour(pair: Pair) -> str:
    return f"--colour:light-dark({pair[0]},{pair[1]})"


def _facts(document: ReportDocument) -> str:
    return "<dl>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
                            for name, value in document.facts) + "</dl>"


def _layers(document: ReportDocument) -> str:
    """The stack as a strip of blocks, first layer first."""
    if not document.layers:
        return ""
    blocks = "".join(f'<i style="{_colour(style.colour)}" title="layer {index}: {escape(name)}"></i>'
                     for index, (name, style) in enumerate(document.layers))
    names = "".join(f'<span style="{_colour(style.colour)}"><b>{GLYPHS[style.symbol]}</b> {escape(name)}</span>'
                    for name, style in dict(document.layers).items())
    return f'<div class="layers" role="img" aria-label="layers by depth">{blocks}</div><p class="key">{names}</p>'


def _contents(document: ReportDocument) -> str:
    entries = [(figure.id, figure.title) for figure in document.figures]
    entries += [(_anchor(title), title) for title, _ in (*document.tables, *document.texts)]
    links = "".join(f'<a href="#{escape(id)}">{escape(title)}</a>' for id, title in entries)
    return f"<nav>{links}</nav>"


def _anchor(title: str) -> str:
    return "section-" + hashlib.sha256(title.encode()).hexdigest()[:8]


def _figure(figure: Figure) -> str:
    wide = isinstance(figure, Heat) or figure.wide or len(figure.panels) > 1
    panels = figure.panels if isinstance(figure, Chart) else [None]
    drawn = "".join(
        f"<div>{f'<h3>{escape(panel.title)}</h3>' if panel and panel.title else ''}"
        f'<div class="plot" data-figure="{escape(figure.id)}" data-panel="{index}" role="img" '
        f'aria-label="{escape(figure.title)}" style="height:{plot["height"]}px"></div></div>'
        for index, (panel, plot) in enumerate(zip(panels, plots(figure), strict=True)))
    named = legend(figure) if isinstance(figure, Chart) else {}
    key = "".join(_key(series) for series in named.values())
    return (f'<figure id="{escape(figure.id)}"{" class=wide" if wide else ""}><figcaption>'
            f"<h2>{escape(figure.title)}</h2><p>{escape(figure.note)}</p>"
            f"{f'<p class=key>{key}</p>' if key else ''}</figcaption>"
            f'<div class="panels{" many" if len(panels) > 3 else ""}">{drawn}</div>'
            f'<details id="{escape(figure.id)}-numbers"><summary>Numbers</summary>'
            f"{_table(figure.table())}</details></figure>")


def _key(series: Series) -> str:
    """A button that hides a series and shows it again."""
    mark = GLYPHS[series.style.symbol] if series.points else "╌╌" if series.style.dash != "solid" else "━"
    return (f'<button type="button" aria-pressed="true" data-name="{escape(series.name)}" '
            f'style="{_colour(series.style.colour)}"><b>{mark}</b> {escape(series.name)}</button>')


def _section(title: str, content: str, *, closed: bool = False) -> str:
    if closed:
        content = f'<details id="{_anchor(title)}-text"><summary>Show</summary>{content}</details>'
    return f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{content}</section>'


def _table(table: Table) -> str:
    head = _cells("th", table.header)
    rows = "".join(f"<tr>{_cells('td', row, table.header)}</tr>" for row in table.rows)
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
            f"{note}")


def _cells(tag: str, texts: Iterable[str], header: Sequence[str] = ()) -> str:
    """Make cells; those under the heading "command" are code in one line, which scrolls and is never wrapped."""
    made = []
    for index, text in enumerate(texts):
        code = index < len(header) and header[index] == "command"
        made.append(f"<{tag}{' class=command' if code else ''}>{escape(text)}</{tag}>")
    return "".join(made)
