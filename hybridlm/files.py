"""Writing files so that they are there whole or not at all, and locks between processes.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> write_json(folder / "result.json", {"loss": 2.5})
>>> json.loads((folder / "result.json").read_text())
{'loss': 2.5}
>>> lock = try_lock(folder / ".lock")
>>> is_locked(folder / ".lock"), try_lock(folder / ".lock")
(True, None)
>>> lock.release()
>>> is_locked(folder / ".lock")
False
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import filelock


def write_bytes(path: Path, data: bytes, *, flush: bool = False) -> None:
    """Replace the file at `path`: a reader, or a crash in between, meets the old content or the new one, never a part.

    Args:
        path: the file; its folder must be there.
        data: the new content.
        flush: wait until the content is on the disk, so that it outlives a machine that loses power.

    Raises:
        OSError: the folder is missing or cannot be written, or the disk is full; the old file stays.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, *, flush: bool = False) -> None:
    """Replace the file at `path` by UTF-8 text, like `write_bytes`."""
    write_bytes(path, text.encode("utf-8"), flush=flush)


def write_json(path: Path, data: Any, *, flush: bool = False) -> None:
    """Replace the file at `path` by `data` as JSON, one line per element, like `write_bytes`."""
    write_text(path, json.dumps(data, indent=1) + "\n", flush=flush)


def try_lock(path: Path) -> filelock.BaseFileLock | None:
    """Lock the file at `path` for this process without waiting; None while another holder has it.

    The system frees a lock when its holder dies; `release()` frees it earlier. A file system that has no locks gives
    one that excludes nobody.

    Raises:
        OSError: the file cannot be made.
    """
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    except NotImplementedError:  # some network file systems
        pass
    return lock


def wait_for_lock(path: Path) -> filelock.BaseFileLock:
    """Lock the file at `path` for this process, waiting until no other holder has it. See `try_lock`.

    Raises:
        OSError: the file cannot be made.
    """
    lock = filelock.FileLock(path)
    with contextlib.suppress(NotImplementedError):  # some network file systems
        lock.acquire()
    return lock


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock at `path`; False where there is no such file or it cannot be opened."""
    if not path.exists():
        return False
    try:
        lock = try_lock(path)
    except OSError:
        return False
    if lock is None:
        return True
    lock.release()
    return False
