"""Tables and the figure of dsa_real_model.py, from what it has measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sweep_tables import table_header, table_row  # the file beside this one

from hybridlm.report.figures import Axis, Chart, Panel, Series
from hybridlm.report.palette import Palette

if TYPE_CHECKING:
    from dsa_real_model import Sizes

TEXTS = ("prose", "code")
SHARES = {"recall": "indexer", "attainable": "attainable", "window": "window", "window_first": "window + first",
          "first": "first", "random": "random"}


def tabulate(found: dict[str, Any], sizes: Sizes) -> str:
    """Tables of everything that is measured, in Markdown."""
    recalls = [(name.split("/")[1:], result) for name, result in found.items() if name.startswith("recall/")]
    lines = ["Attention on the selected keys, means over layers; queries that see more keys than are selected", "",
             *table_header("indexers", "text", "tokens", "KL", *SHARES.values())]
    lines += [table_row(*where, f"{result['mean']['kl']:.3f}", *_shares(result["mean"])) for where, result in recalls]
    lines += ["", "By tokens before the query", "",
              *table_header("indexers", "text", "tokens", "before", "queries", *SHARES.values())]
    for where, result in recalls:
        lines += [table_row(*where, f"{row['start']}-{row['stop'] - 1}", f"{row['queries']}", *_shares(row))
                  for row in result["mean"]["by_position"]]
    for text in TEXTS:
        lines += _tabulate_layers(found, text, sizes)
    lines += ["", f"Loss in nats per token, {sizes.length} tokens", "", *table_header("model", "attention", *TEXTS)]
    for pair in _pairs(found, "loss"):
        results = [found.get("/".join(("loss", *pair, text))) for text in TEXTS]
        lines.append(table_row(*pair, *("-" if result is None else f"{result['loss']:.4f}" for result in results)))
    lines += ["", f"Negative log-likelihood of the second copy, {sizes.length // 2} tokens behind the first", "",
              *table_header("model", "attention", "random tokens", "code")]
    for pair in _pairs(found, "repeat"):
        result = found["/".join(("repeat", *pair))]
        lines.append(table_row(*pair, f"{result['random']:.3f}", f"{result['code']:.3f}"))
    return "\n".join(lines) + "\n"


def _shares(row: dict[str, Any]) -> list[str]:
    return ["-" if row[key] is None else f"{row[key]:.3f}" for key in SHARES]


def _pairs(found: dict[str, Any], kind: str) -> list[list[str]]:
    """Models and their attention of which something of a kind is measured."""
    return list(map(list, dict.fromkeys(tuple(name.split("/")[1:3]) for name in found if name.startswith(kind))))


def layer_rows(found: dict[str, Any], text: str, sizes: Sizes) -> dict[int, dict[str, Any]]:
    """The measurement of each layer at the greater length: of the trained indexers, and of fresh ones elsewhere."""
    rows: dict[int, dict[str, Any]] = {}
    for model in ("fresh", "warmup_2048"):
        result = found.get(f"recall/{model}/{text}/{sizes.long_length}", {"layers": []})
        rows |= {row["layer"]: row for row in result["layers"]}
    return dict(sorted((layer, row) for layer, row in rows.items() if row["queries"]))


def _tabulate_layers(found: dict[str, Any], text: str, sizes: Sizes) -> list[str]:
    rows = layer_rows(found, text, sizes)
    converted = [layer for layer in json.loads(sizes.layers) if layer in rows]
    below = [layer for layer in converted if rows[layer]["recall"] <= rows[layer]["window_first"]]
    return ["", f"By layer, {text}, {sizes.long_length} tokens, after both warm-ups; other layers have fresh indexers, "
            "which nothing uses", "", *table_header("layer", "KL", *SHARES.values()),
            *(table_row(f"{layer}", f"{row['kl']:.3f}", *_shares(row)) for layer, row in rows.items()), "",
            f"The indexer finds more than the window with the first token in {len(converted) - len(below)} of "
            f"{len(converted)} converted layers" + (f", but not in {below}." if below else ".")]


def make_figure(found: dict[str, Any], sizes: Sizes) -> Chart:
    """Recall by layer of the trained indexers, beside what needs none."""
    palette = Palette(SHARES.values())
    panels = []
    for text in TEXTS:
        rows = layer_rows(found, text, sizes)
        panels.append(Panel(text, [Series(name, palette[name], list(rows), [row[key] for row in rows.values()],
                                          points=True) for key, name in SHARES.items()]))
    return Chart("recall-by-layer", f"Attention on {sizes.topk} of up to {sizes.long_length} keys", "",
                 Axis("layer", "count"), Axis("share of dense attention", "share"), panels, wide=True)
