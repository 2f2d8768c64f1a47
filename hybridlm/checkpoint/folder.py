"""Checkpoint folders: writing the manifest, verifying a folder against it, and resolving a path to a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hybridlm.distributed.communicator import SINGLE_PROCESS, Communicator
from hybridlm.errors import CheckpointError, did_you_mean_path
from hybridlm.files import step_folders, step_of
from hybridlm.version import __version__

FORMAT_VERSION = 2  # see `hybridlm.checkpoint.legacy_names` for the names of earlier formats
MANIFEST = "manifest.json"
DRAFT_PREFIX = ".tmp-"

log = logging.getLogger("hybridlm")


def manifest_entry(file: Path) -> dict[str, Any]:
    """Flush a file to disk and return its entry in the manifest: size in bytes and SHA-256."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def seal(folder: Path, step: int, written: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Flush every file of `folder` to disk and write the manifest that makes it a checkpoint.

    Args:
        folder: a draft.
        step: optimizer steps done.
        written: entries of files that are flushed already, by name.
    """
    files = {file.name: written.get(file.name) or manifest_entry(file) for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT_VERSION, "hybridlm": __version__, "step": step, "files": files}
    manifest["sha256"] = _own_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def swap_in(draft: Path, target: Path) -> None:
    """Rename a sealed draft to its final name; an older folder of that name is deleted."""
    old = target.with_name(f"{DRAFT_PREFIX}old-{target.name}")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    draft.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk; folders cannot be flushed on every system."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _own_hash(manifest: dict[str, Any]) -> str:
    """Hash a manifest without the hash it contains, independent of the layout of its JSON."""
    hashed = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_drafts(root: Path) -> None:
    """Delete the drafts of interrupted saves. The caller must hold the lock of the run folder."""
    for folder in root.glob(f"{DRAFT_PREFIX}*") if root.is_dir() else ():
        shutil.rmtree(folder, ignore_errors=True)


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and incomplete ones older than those."""
    complete = 0
    for folder in step_folders(root):
        if complete >= keep:
            removed = folder.with_name(f"{DRAFT_PREFIX}old-{folder.name}")
            with contextlib.suppress(OSError):
                folder.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
        else:
            complete += not _structure_fault(folder)[0]


def _fault(folder: Path, ranks: Communicator, hashes: bool) -> str:
    """Describe what is wrong with the folder, "" if nothing. Each of its files is read by one of the ranks."""
    fault, files = ranks.on_main(lambda: _structure_fault(folder))
    if fault or not hashes:
        return fault
    largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    mine = {name: _changed(folder / name, files[name]) for name in largest_first[ranks.rank::ranks.world_size]}
    found = {name: change for part in ranks.gather(mine) for name, change in part.items() if change}
    return found[min(found)] if found else ""


def _structure_fault(folder: Path) -> tuple[str, dict[str, Any]]:
    """Check names and sizes: a description of the fault, "" for none, and the manifest's entries if there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        own_hash = manifest["sha256"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}", {}
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read", {}
    if own_hash != _own_hash(manifest):
        return f"its {MANIFEST} has changed since it was written", {}
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing", {}
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written", {}
    return "", files


def _changed(file: Path, expected: Mapping[str, Any]) -> str:
    try:
        return "" if _sha256(file) == expected["sha256"] else f"{file.name} has changed since it was written"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"


def verify(folder: Path, ranks: Communicator = SINGLE_PROCESS, *, hashes: bool = True) -> None:
    """Check the folder against its manifest. With `hashes=False` files are not read, only names and sizes compared.

    Raises:
        CheckpointError: torn, truncated or altered files, or a format of a newer version.
    """
    fault = _fault(folder, ranks, hashes)

    def refuse() -> None:
        if fault:
            raise CheckpointError(f"checkpoint {folder} is damaged: {fault}; use an older checkpoint of the run")
        _check_format(folder)

    ranks.on_main(refuse)


def _check_format(folder: Path) -> None:
    version = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("format")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(f"checkpoint {folder} has format {version}; this version reads up to "
                              f"{FORMAT_VERSION}; update hybridlm")


def newest(root: Path, ranks: Communicator = SINGLE_PROCESS, *, hashes: bool = True) -> Path | None:
    """Return the newest complete checkpoint under `root`; each damaged one is skipped with a warning.

    Args:
        root: folder of checkpoints.
        ranks: the processes, which call it together.
        hashes: whether to read and hash the files, as in `verify`.

    Returns:
        The checkpoint, None if there is none.

    Raises:
        CheckpointError: it has a format of a newer version.
    """
    for folder in ranks.on_main(lambda: step_folders(root)):
        fault = _fault(folder, ranks, hashes)
        if not fault:
            ranks.on_main(partial(_check_format, folder))
            return folder
        log.warning("checkpoint %s is damaged (%s): looking for an older one", folder, fault)
    return None


def resolve(path: str | os.PathLike[str], ranks: Communicator = SINGLE_PROCESS, *, hashes: bool = True) -> Path:
    """Resolve a path to a checkpoint: the folder itself, or the newest complete one of a run folder.

    Args:
        path: a checkpoint folder (step-300), a run folder, or its folder of checkpoints.
        ranks: the processes, which call it together.
        hashes: whether to read and hash the files, as in `verify`.

    Raises:
        CheckpointError: there is no complete checkpoint, or it has a format of a newer version.
    """
    given = Path(path).expanduser()
    single, root = ranks.on_main(lambda: _checkpoint_or_root(given))
    if single:
        verify(root, ranks, hashes=hashes)
        return root
    found = newest(root, ranks, hashes=hashes)
    if found is None:
        ranks.on_main(lambda: _refuse_empty(given))
    return found  # type: ignore[return-value]


def _checkpoint_or_root(folder: Path) -> tuple[bool, Path]:
    """Return whether the folder is a checkpoint, and the folder itself or the one its checkpoints are in."""
    if not folder.exists():
        hint = did_you_mean_path(folder)
        raise CheckpointError(f"no checkpoint at {folder}: the path does not exist{'; ' if hint else ''}{hint}")
    if (folder / MANIFEST).exists() or step_of(folder) is not None:
        return True, folder
    return False, folder if step_folders(folder) else folder / "checkpoints"


def _refuse_empty(folder: Path) -> None:
    hint = ""
    if (folder / "config.json").is_file():
        hint = f"; it looks like a model of transformers, which hybridlm import {folder} checkpoints/NAME converts"
    raise CheckpointError(f"no whole checkpoint in {folder}: expected a checkpoint folder (step-N) or a run folder "
                          f"that has one{hint}")
