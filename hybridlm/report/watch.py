"""Writes the page of a run or sweep again whenever its files have changed, until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridlm.report.read import RUN_FILES

LOOK_EVERY_S = 10
WATCHED = (*RUN_FILES, "sweep.json", "outcome.json")


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, times (ns) and sizes (bytes) of the files that a report of this folder reads."""
    found = []
    for file in sorted(file for name in WATCHED for file in (folder / name, *folder.glob(f"points/*/{name}"))):
        try:
            stat = file.stat()
        except OSError:
            continue
        found.append((str(file), stat.st_mtime_ns, stat.st_size))
    return found + [(str(file), 0, 0) for file in sorted(folder.glob("points/*/probes/*.json"))]


def watch(folders: Sequence[Path], write: Callable[[bool], dict[str, Any]], *, every: float = LOOK_EVERY_S,
          say: Callable[[str], None] = print, sleep: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Write the page now, after every change of a folder, and once more when Ctrl-C ends the watching.

    Args:
        folders: a run or sweep, or the runs that are compared.
        write: writes the page; its argument says whether the page shall load itself again.
        every: seconds between two looks at the folders.
        say: prints a message.
        sleep: waits so many seconds; default `time.sleep`.

    Returns:
        What the last call, `write(False)`, returned.

    Raises:
        UserError: what the first call raises, for there is no report on such a folder.
    """
    def look() -> list[list[tuple[str, int, int]]]:
        return [state_of(folder) for folder in folders]

    seen = look()
    names = ", ".join(map(str, folders))
    result = write(True)
    try:
        say(f"{result['page']}: written again when {names} changes, looked at every {every:g} s; Ctrl-C ends")
        while True:
            (sleep or time.sleep)(every)
            if (now := look()) != seen:
                seen = now
                result = write(True)
    except KeyboardInterrupt:
        return write(False)
