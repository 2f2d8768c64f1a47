"""Lineage of a run: lineage.json in run folders and checkpoints names what it began from, and what that began from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINEAGE_FILE = "lineage.json"


def read_lineage(folder: str | Path) -> dict[str, Any] | None:
    """Read the lineage of a run folder or checkpoint; None where it began with fresh weights, or no file says."""
    folder = Path(folder)
    places = [folder]
    if folder.parent.name == "checkpoints":
        places.append(folder.parent.parent)
    for place in places:
        try:
            found = json.loads((place / LINEAGE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return None


def make_lineage(how: str, folder: Path, changes: list[tuple[str, Any, Any]], when: str) -> dict[str, Any]:
    """Make the lineage of a run that begins from a checkpoint.

    Args:
        how: "branch" (goes on with its training) or "init" (takes its weights).
        folder: the checkpoint.
        changes: keys of the config with their old and new values.
        when: the time, in ISO 8601.
    """
    try:
        progress = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))["progress"]
    except (OSError, ValueError, KeyError, TypeError):
        progress = {}  # imported, not trained here
    return {"how": how, "checkpoint": str(folder.resolve()), "time": when,
            **{key: progress.get(key, 0) for key in ("step", "samples", "tokens")},
            "changes": [{"key": key, "old": old, "new": new} for key, old, new in changes],
            "before": read_lineage(folder)}


def lineage_steps(lineage: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Iterate over a lineage: what the run began from, then what that run began from, and so on."""
    while isinstance(lineage, dict):
        yield lineage
        lineage = lineage.get("before")


def describe_lineage(lineage: dict[str, Any] | None) -> list[str]:
    """Describe a lineage in one line per checkpoint, the nearest first.

    Example:
        >>> describe_lineage({"how": "branch", "checkpoint": "/runs/a/checkpoints/step-300", "step": 300,
        ...                   "changes": [{"key": "optimizer.lr", "old": 0.001, "new": 0.0001}]})
        ['branch of /runs/a/checkpoints/step-300 (step 300): optimizer.lr 0.001 -> 0.0001']
    """
    words = {"branch": "branch of", "init": "weights of"}
    lines = []
    for entry in lineage_steps(lineage):
        changes = "; ".join(f"{c['key']} {c['old']} -> {c['new']}" for c in entry.get("changes", ()))
        step = f" (step {entry['step']})" if entry.get("step") else ""
        lines.append(f"{words.get(entry.get('how', ''), 'from')} {entry.get('checkpoint')}{step}"
                     + (f": {changes}" if changes else ""))
    return lines
