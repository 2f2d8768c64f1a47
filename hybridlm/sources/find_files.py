"""Files of a path, folder or pattern, each with the reader of its format. Only names, sizes and times are read."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hybridlm.errors import DataError, nearest
from hybridlm.sources.compression import COMPRESSED_SUFFIXES
from hybridlm.sources.contract import AUTO, FILE_READERS, Document, Source, SourceOptions, Unit, suffix_formats

RUN_FILES = {"run.json", "config.yaml"}  # a folder that holds them is that of a run
MAX_LISTED_SUFFIXES = 8  # of a folder without known files, in the error


def open_files(options: SourceOptions) -> Source:
    """Find the files that `options.path` names, in the order of their paths.

    Args:
        options: `path`, `format`, and what the readers take.

    Raises:
        DataError: no such file, a folder without known files, or a file whose format cannot be recognised.
    """
    files, ignored = _find(options)
    units = [file_unit(file, options, options.format) for file in files]
    return Source(options.path, units, {
        "invalid_utf8": options.invalid_utf8, "text_field": options.text_field,
        "document_separator": options.document_separator or ""}, ignored)


def file_unit(path: str, options: SourceOptions, format_name: str) -> Unit:
    """One file as a unit, read by the format of this name, or by that of its suffix for `auto`.

    Raises:
        DataError: `auto`, and no reader knows the suffix.
    """
    if format_name == AUTO:
        suffix = suffix_of(path)
        if suffix is None:
            raise DataError(f"{path}: unknown kind of file; expected {_known_suffixes(AUTO, by_name=True)}; "
                            "set data.format=text to read it as plain text")
        format_name = suffix_formats(by_name=True)[suffix]
    reader = FILE_READERS[format_name]
    absolute = os.path.abspath(path)
    stat = os.stat(path)
    fingerprint: tuple[str | int, ...] = (format_name, absolute, stat.st_size, stat.st_mtime_ns)

    def documents(skip: int) -> Iterator[Document]:
        return reader.read(Path(path), options, skip)

    return Unit(path, stat.st_size, (*fingerprint, reader.code) if reader.code else fingerprint, documents,
                path=os.path.realpath(path))


def suffix_of(name: str) -> str | None:
    """The registered suffix that a file name ends with, the longest if there are several."""
    found = [suffix for suffix in suffix_formats(by_name=True) if name.lower().endswith(suffix)]
    return max(found, key=len, default=None)


def path_exists(path: str) -> bool:
    """Whether a file or folder is there, or a pattern matches a file."""
    return os.path.exists(os.path.expanduser(path)) or (glob.has_magic(path) and bool(_matches(path)))


def walk(root: str, skip: Callable[[str], bool]) -> list[str]:
    """Find the files below `root`, sorted by their path within it; links are followed, but no folder twice.

    Args:
        root: a folder.
        skip: tells by its name whether a folder is left out; hidden files and folders, and folders of runs, always are.
    """
    found: list[str] = []
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if folder != root and set(files) >= RUN_FILES:
            folders.clear()  # what a run wrote is no text of a corpus, and changes while it trains
            continue
        folders[:] = sorted(name for name in folders if not skip(name) and not name.startswith("."))
        found += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda p: Path(os.path.relpath(p, root)).as_posix())


def _matches(pattern: str) -> list[str]:
    return [p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)]


def _find(options: SourceOptions) -> tuple[list[str], int]:
    """Files of a path or pattern, and how many files of a folder were passed over."""
    path = os.path.expanduser(options.path)
    if os.path.isfile(path):
        return [path], 0
    if os.path.isdir(path):
        every = walk(path, lambda name: name == "__pycache__")
        formats = suffix_formats(by_name=options.format != AUTO)
        wanted = {suffix for suffix, name in formats.items() if options.format in (AUTO, name)}
        known = [p for p in every if suffix_of(p) in wanted]
        if not known:
            raise _nothing_known(options, every)
        return known, len(every) - len(known)
    found = sorted(_matches(options.path)) if glob.has_magic(path) else []
    if not found:
        raise _missing(options.path)
    return found, 0


def _known_suffixes(format_name: str, by_name: bool) -> str:
    """The endings of files of a format, or of all, for an error; those of compressed files in short."""
    readers = [reader for name, reader in FILE_READERS.items() if format_name in (AUTO, name)]
    plain = sorted({suffix for reader in readers
                    for suffix in (*reader.suffixes, *(reader.by_name if by_name else ()))})
    packed = f" (and {' '.join(COMPRESSED_SUFFIXES)} behind them)" if any(r.compressed for r in readers) else ""
    return " ".join(plain) + packed


def _nothing_known(options: SourceOptions, files: list[str]) -> DataError:
    """The error for a folder without a file to read; its advice works for the files that are there."""
    suffixes = [suffix_of(p) or os.path.splitext(p)[1] for p in files]
    there = sorted({suffix or "no suffix" for suffix in suffixes})
    readable = next((suffix for suffix in suffixes if suffix in suffix_formats(by_name=True)), None)
    other = next((suffix for suffix in suffixes if suffix), None)
    if not files:
        hint = "put text files there, or name another folder"
    elif readable is not None:
        hint = f"data.format={suffix_formats(by_name=True)[readable]} reads the {readable} files"
    elif other is not None:
        hint = f"data.path='{options.path.rstrip('/')}/**/*{other}' data.format=text reads {other} files as plain text"
    else:
        hint = f"data.path='{options.path.rstrip('/')}/**/*' data.format=text reads any file as plain text"
    expected = _known_suffixes(options.format, by_name=options.format != AUTO)
    return DataError(f"{options.path}: no file to read in this folder; expected {expected}; "
                     f"it holds {', '.join(there[:MAX_LISTED_SUFFIXES]) or 'nothing'}; {hint}")


def _missing(path: str) -> DataError:
    if glob.has_magic(path):
        return DataError(f"{path}: no file matches this pattern; it is looked up from {os.getcwd()}")
    parent = Path(path).expanduser().parent
    beside = {name: str(parent / name) for name in (os.listdir(parent) if parent.is_dir() else [])}
    beside["stdlib"] = "stdlib"
    near = nearest(Path(path).name, beside)
    hint = f"did you mean '{beside[near]}'?" if near else \
        f"relative paths start at {os.getcwd()}; a data set by name needs data.format=dataset or the form owner/name"
    return DataError(f"{path}: no such file or folder; {hint}")
