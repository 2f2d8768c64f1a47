"""What a user calls a source (`stdlib`, a path, a pattern, a data set) as an ordered list of units.

Nothing is read here but names, sizes and times; the network is asked only for a data set that the user named.
"""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hybridlm.config.schema import DataSourceConfig
from hybridlm.data import readers
from hybridlm.data.hub import NotFound, look_up
from hybridlm.data.readers import Document, Unit
from hybridlm.errors import DataError, nearest

SUFFIXES = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".jsonl.gz": "jsonl",
            ".parquet": "parquet"}
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass
class Source:
    """Documents in a fixed order, unit by unit. `ignored`: files of a folder that no reader knows."""

    label: str
    units: list[Unit]
    options: dict[str, Any] = field(default_factory=dict)  # what else decides which documents come out
    ignored: int = 0
    left_out: int = 0  # files that belong to validation

    def fingerprint(self) -> dict[str, Any]:
        """Changes whenever other documents could come out."""
        return {"units": [list(unit.fingerprint) for unit in self.units], "options": self.options}

    def documents(self, unit: int = 0, skip: int = 0) -> Iterator[tuple[int, int, Document]]:
        """(unit, number in the unit, document) from a given place on.

        Raises:
            DataError: a file that cannot be read, or does not hold what its kind promises.
        """
        for number in range(unit, len(self.units)):
            first = skip if number == unit else 0
            try:
                for place, document in enumerate(self.units[number].documents(first), start=first):
                    yield number, place, document
            except OSError as error:
                raise DataError(f"{self.units[number].name}: cannot be read ({error})") from error


def open_source(config: DataSourceConfig, leave_out: frozenset[str] = frozenset()) -> Source:
    """Find what `config` names. `leave_out`: real paths of files that belong to another split.

    Raises:
        DataError: nothing there, an empty file, a folder without known files, a format that does not fit.
    """
    kind = config.format if config.format != "auto" else _guess(config.path)
    if kind == "dataset":
        return _open_dataset(config)
    options: dict[str, Any] = {"invalid_utf8": config.invalid_utf8}
    if kind == "stdlib":
        files, ignored, label = _library_files(), 0, "stdlib"
    else:
        files, ignored = _find(config)
        label = config.path
        options |= {"text_field": config.text_field, "document_separator": config.document_separator or ""}
    kept = [file for file in files if os.path.realpath(file) not in leave_out]
    if not kept:
        raise DataError(f"{config.path}: all {len(files)} files of the training data belong to validation_path; "
                        "give training other files")
    units = [_file_unit(file, config, "text" if kind == "stdlib" else kind) for file in kept]
    if not any(unit.size for unit in units):
        what = "the file is empty" if len(units) == 1 else f"all {len(units)} files are empty"
        raise DataError(f"{label}: {what}; expected text")
    return Source(label, units, options, ignored, len(files) - len(kept))


def is_hub_name(config: DataSourceConfig) -> bool:
    """Is this a data set that stands nowhere here?"""
    kind = config.format if config.format != "auto" else _guess(config.path)
    return kind == "dataset" and not _saved_dataset(Path(config.path).expanduser())


def _guess(path: str) -> str:
    """The kind of a path whose format is `auto`: stdlib, dataset, or auto for files."""
    if not path.strip():
        raise DataError("data.path: is empty; expected stdlib, a file, a folder or a data set")
    if path == "stdlib":
        return "stdlib"
    if _saved_dataset(Path(path).expanduser()):
        return "dataset"
    if not _exists(path) and HUB_NAME.fullmatch(path) and not suffix_of(path) \
            and not os.path.exists(path.split("/")[0]):
        return "dataset"
    return "auto"


def suffix_of(name: str) -> str | None:
    """The suffix in SUFFIXES that a file name ends with."""
    return next((s for s in SUFFIXES if name.lower().endswith(s)), None)


def _saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file())


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path)) or (glob.has_magic(path) and bool(_matches(path)))


def _matches(pattern: str) -> list[str]:
    return [p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)]


def _library_files() -> list[str]:
    """The standard library's own sources, without tests and installed packages, by relative path."""
    root = sysconfig.get_paths()["stdlib"]
    files = [p for p in _walk(root, lambda name: name in NOT_LIBRARY) if p.endswith(".py")]
    if not files:
        raise DataError(f"stdlib: this Python keeps no sources in {root}; set data.path to a text file or folder")
    return files


def _walk(root: str, skip: Callable[[str], bool]) -> list[str]:
    """Files below `root`, links followed but no folder twice, sorted by path within `root`."""
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not skip(name) and not name.startswith("."))
        found += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda p: Path(os.path.relpath(p, root)).as_posix())


def _find(config: DataSourceConfig) -> tuple[list[str], int]:
    """Files of a path or pattern, and how many files of a folder were passed over."""
    path = os.path.expanduser(config.path)
    wanted = {s for s, kind in SUFFIXES.items() if config.format in ("auto", kind)}
    if os.path.isfile(path):
        return [path], 0
    if os.path.isdir(path):
        every = _walk(path, lambda name: name == "__pycache__")
        known = [p for p in every if suffix_of(p) in wanted]
        if not known:
            held = sorted({os.path.splitext(p)[1] or "no suffix" for p in every})
            raise DataError(f"{config.path}: no file to read in this folder; expected {' '.join(sorted(wanted))}; "
                            f"it holds {', '.join(held[:8]) or 'nothing'}; a pattern such as "
                            f"'{config.path.rstrip('/')}/**/*.ext' with data.format=text reads other suffixes")
        return known, len(every) - len(known)
    found = sorted(_matches(config.path)) if glob.has_magic(path) else []
    if not found:
        raise _missing(config.path)
    return found, 0


def _missing(path: str) -> DataError:
    if glob.has_magic(path):
        return DataError(f"{path}: no file matches this pattern; it is looked up from {os.getcwd()}")
    parent = Path(path).expanduser().parent
    names = os.listdir(parent) if parent.is_dir() else []
    near = nearest(Path(path).name, [*names, "stdlib"])
    hint = f"did you mean '{near if near == 'stdlib' else parent / near}'?" if near else \
        f"relative paths start at {os.getcwd()}; a data set by name needs data.format=dataset or the form owner/name"
    return DataError(f"{path}: no such file or folder; {hint}")


def _file_unit(path: str, config: DataSourceConfig, kind: str) -> Unit:
    if kind == "auto":
        suffix = suffix_of(path)
        if suffix is None:
            raise DataError(f"{path}: unknown kind of file; expected {' '.join(sorted(SUFFIXES))}; "
                            "set data.format=text to read it as plain text")
        kind = SUFFIXES[suffix]
    absolute, stat = os.path.abspath(path), os.stat(path)
    file = Path(path)
    read: Callable[[int], Iterator[Document]]
    if kind == "text":
        read = partial(readers.read_text, file, config.invalid_utf8, config.document_separator)
    elif kind == "jsonl":
        read = partial(readers.read_jsonl, file, config.invalid_utf8, config.text_field)
    else:
        read = partial(readers.read_parquet, file, config.invalid_utf8, config.text_field)
    return Unit(path, stat.st_size, (kind, absolute, stat.st_size, stat.st_mtime_ns), read,
                path=os.path.realpath(path))


def _open_dataset(config: DataSourceConfig) -> Source:
    """A saved `datasets` folder, or a data set by name: the only thing here that may use the network."""
    import datasets

    folder = Path(config.path).expanduser()
    local = _saved_dataset(folder)
    try:
        if local:
            data = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.DatasetDict):
                if config.split not in data:
                    raise DataError(f"{config.path}: no split '{config.split}'; it has: {', '.join(data)}; "
                                    "set data.split")
                data = data[config.split]
        else:
            data = look_up(lambda: datasets.load_dataset(config.path, config.name, split=config.split))
    except DataError:
        raise
    except NotFound as error:
        raise DataError(f"{config.path}: no such file or folder here, and no data set of this name could be loaded "
                        f"({error})") from error
    except Exception as error:  # the library and its back ends raise dozens of kinds
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(f"{config.path}: the saved data set cannot be read ({type(error).__name__}: {reason})"
                        ) from error
    label = f"{config.path} [{config.split}]"
    if config.text_field not in data.column_names:
        raise readers.missing_field(label, config.text_field, data.column_names)
    if len(data) == 0:
        raise DataError(f"{label}: the data set has no rows")
    column = data.data.column(config.text_field)
    options = {"invalid_utf8": config.invalid_utf8, "text_field": config.text_field}
    unit = Unit(label, column.nbytes, ("dataset", data._fingerprint, len(data)),
                partial(readers.read_dataset, data, label, config.invalid_utf8, config.text_field))
    return Source(label, [unit], options)
