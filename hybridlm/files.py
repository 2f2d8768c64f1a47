"""Writing files so that they are there whole or not at all, locks between processes, folders named step-N.

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

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import filelock

try:
    import fcntl
except ImportError:  # not a Unix system
    fcntl = None  # type: ignore[assignment]

WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # what a file system without locks says
log = logging.getLogger("hybridlm")
_warned_folders: set[Path] = set()


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


def step_of(folder: Path) -> int | None:
    """Return N of a folder named step-N, None for another name.

    >>> step_of(Path("checkpoints/step-300"))
    300
    """
    number = folder.name.removeprefix("step-")
    return int(number) if folder.name.startswith("step-") and number.isdecimal() else None


def step_folders(root: Path) -> list[Path]:
    """List the step-N folders under `root`, newest first, complete or not."""
    found = [(step_of(f), f) for f in root.iterdir() if f.is_dir()] if root.is_dir() else []
    return [f for n, f in sorted(((n, f) for n, f in found if n is not None), reverse=True)]


class Lock(Protocol):
    """A lock that this process holds."""

    def release(self) -> None:
        """Free the lock."""


class _NoLock:
    """Stands for a lock on a file system that has none; it excludes nobody."""

    def release(self) -> None:
        pass


def try_lock(path: Path) -> Lock | None:
    """Lock the file at `path` for this process without waiting; None while another holder has it.

    The system frees a lock when its holder dies; `release()` frees it earlier. A file system that has no locks gives
    one that excludes nobody, with a warning in the log.

    Raises:
        OSError: the file cannot be made.
    """
    return _lock(path, timeout=0)


def wait_for_lock(path: Path) -> Lock:
    """Lock the file at `path` for this process, waiting until no other holder has it. See `try_lock`.

    Raises:
        OSError: the file cannot be made.
    """
    lock = _lock(path, timeout=-1)
    assert lock is not None  # it waits without end
    return lock


def _lock(path: Path, timeout: float, warn: bool = True) -> Lock | None:
    if _lacks_locks(path):
        if warn:
            _warn_of_no_locks(path.parent)
        return _NoLock()
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout:
        return None
    return lock


def _lacks_locks(path: Path) -> bool:
    """Whether the file system of `path` has no locks (Lustre mounted without flock, NFS without its lock service).

    Freeing a lock that nobody holds tells it: nothing changes, and no other process notices.
    """
    if fcntl is None:
        return False
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return True
    finally:
        os.close(descriptor)
    return False


def _warn_of_no_locks(folder: Path) -> None:
    if folder not in _warned_folders:
        _warned_folders.add(folder)
        log.warning("%s: this file system has no file locks, so nothing keeps a second process out of this folder; "
                    "start only one there, or mount it with locks (Lustre: -o flock)", folder)


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock at `path`; False where there is no such file or it cannot be opened."""
    if not path.exists():
        return False
    try:
        lock = _lock(path, timeout=0, warn=False)
    except OSError:
        return False
    if lock is None:
        return True
    lock.release()
    return False
