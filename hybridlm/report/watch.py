"""A page that follows a run: written again whenever the files of the run have changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridlm.report.read import RUN_FILES

EVERY = 10  # seconds
WATCHED = (*RUN_FILES, "sweep.json", "outcome.json")


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, times and sizes of what a report reads."""
    found = []
    for file in sorted(file for name in WATCHED for file in (folder / name, *folder.glob(f"points/*/{name}"))):
        try:
            stat = file.stat()
        except OSError:
            continue
        found.append((str(file), stat.st_mtime_ns, stat.st_size))
    return found + [(str(file), 0, 0) for file in sorted(folder.glob("points/*/probes/*.json"))]


def watch(folder: Path, write: Callable[[bool], dict[str, Any]], *, every: float = EVERY,
          say: Callable[[str], None] = print, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Calls `write(True)` now and after every change, until Ctrl-C; then `write(False)` once, whose result it returns.

    `write` gets whether the page should load itself again. Errors of the first call are the caller's: a folder that
    cannot be reported on now will not be later, or is better asked for later.
    """
    seen = state_of(folder)
    result = write(True)
    say(f"{result['page']}: written again when {folder} changes, looked at every {every:g} s; Ctrl-C ends")
    try:
        while True:
            sleep(every)
            if (now := state_of(folder)) != seen:
                seen = now
                result = write(True)
    except KeyboardInterrupt:
        return write(False)
