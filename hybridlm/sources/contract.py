"""The contract of data sources: documents, the units that yield them, and the registries of formats.

A format is one file of this package, or of a user's own (`--import FILE`). Files of a new kind need a reader:

    @register_file_reader("lines", ".lines")
    def read_lines(path, options, skip):
        with path.open("rb") as file:
            for line in itertools.islice(file, skip, None):
                yield Document(line.rstrip(b"\\n"))

It reads `data.path=corpus/` where files end in .lines, and any file with `data.format=lines`. What is not a file (a
database, a generator) is a function that returns a `Source`, and is named by `data.format`:

    @register_source("digits")
    def open_digits(options):
        return Source("digits", [Unit("digits", 10, ("digits", 1), yield_digits)])
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from hybridlm.errors import ConfigError, DataError, did_you_mean
from hybridlm.kind_registry import KindError
from hybridlm.sources.compression import COMPRESSED_SUFFIXES

AUTO = "auto"  # the format of a path that is recognised by its name and by what stands there
InvalidUTF8 = Literal["error", "replace"]


class SourceOptions(Protocol):
    """The keys of the data config that a source may read; docs/configuration.md describes them."""

    path: str
    format: str
    text_field: str
    split: str
    name: str | None
    document_separator: str | None
    invalid_utf8: InvalidUTF8


class Document(NamedTuple):
    """One text in UTF-8. `replaced`: bytes that were not UTF-8 became U+FFFD."""

    text: bytes
    replaced: bool = False


@dataclass(frozen=True)
class Unit:
    """A file or a data set: documents in a fixed order.

    Args:
        name: its name in errors.
        size: bytes, roughly: its part of the progress bar.
        fingerprint: changes when the content may have changed.
        documents: `documents(skip)` yields its documents from number `skip` (from 0) on, empty ones too.
        path: real path of a file; None for anything else.
    """

    name: str
    size: int
    fingerprint: tuple[str | int, ...]
    documents: Callable[[int], Iterator[Document]]
    path: str | None = None


@dataclass
class Source:
    """Documents in a fixed order, unit by unit.

    Args:
        label: its name in messages.
        units: what it consists of, in order.
        options: what else decides which documents come out, as plain data.
        ignored: files of a folder that no reader knows.
        left_out: files that belong to validation.
    """

    label: str
    units: list[Unit]
    options: dict[str, Any] = field(default_factory=dict)
    ignored: int = 0
    left_out: int = 0

    def fingerprint(self) -> dict[str, Any]:
        """Plain data that changes whenever other documents could come out."""
        return {"units": [list(unit.fingerprint) for unit in self.units], "options": self.options}

    def documents(self, unit: int = 0, skip: int = 0) -> Iterator[tuple[int, int, Document]]:
        """Yield (unit, number in the unit, document), beginning with document `skip` of unit `unit`.

        Raises:
            DataError: a file cannot be read, or does not hold what its format promises.
        """
        for unit_number in range(unit, len(self.units)):
            current = self.units[unit_number]
            first = skip if unit_number == unit else 0
            try:
                for number, document in enumerate(current.documents(first), start=first):
                    if not isinstance(document, Document):
                        raise DataError(f"{current.name}: its reader yields {type(document).__name__}; expected "
                                        "hybridlm.sources.Document(text in UTF-8 bytes)")
                    yield unit_number, number, document
            except OSError as error:
                raise DataError(f"{current.name}: cannot be read ({error})") from error


FileReaderFunction = Callable[[Path, Any, int], Iterator[Document]]
SourceFunction = Callable[[Any], Source]


@dataclass(frozen=True)
class FileReader:
    """A registered format of files.

    Args:
        read: yields the documents of a file.
        suffixes: endings of file names that it reads.
        by_name: endings that it reads only where a file, pattern or the format is named: in a folder such files are as
            likely something else.
        compressed: each ending may be followed by one of `COMPRESSED_SUFFIXES`.
        code: digest of the file that defines a reader of the user's own, else empty.
    """

    read: FileReaderFunction
    suffixes: tuple[str, ...]
    by_name: tuple[str, ...]
    compressed: bool
    code: str

    def endings(self, by_name: bool) -> list[str]:
        """All endings that it reads in a folder, and those that it reads only by name where `by_name` is set."""
        packed = COMPRESSED_SUFFIXES if self.compressed else ()
        plain = (*self.suffixes, *(self.by_name if by_name else ()))
        return [*plain, *(suffix + end for suffix in (*self.suffixes, *self.by_name) for end in packed)]


@dataclass(frozen=True)
class SourceOpener:
    """A registered source that is not made of files. `code`: as in `FileReader`."""

    open: SourceFunction
    code: str


FILE_READERS: dict[str, FileReader] = {}
SOURCES: dict[str, SourceOpener] = {}


def register_file_reader(name: str, *suffixes: str, by_name: tuple[str, ...] = (),
                         compressed: bool = False) -> Callable[[FileReaderFunction], FileReaderFunction]:
    """Register the decorated function as the reader of files of one format.

    The function is called as `read(path, options, skip)` and yields the `Document`s of the file from number `skip` on,
    in a fixed order. Prepared tokens are made anew when the file that defines it changes.

    Args:
        name: the value of `data.format` that selects it.
        suffixes: endings of file names that `data.format=auto` reads with it, such as ".csv".
        by_name: endings that it reads where a file, a pattern or the format is named, but passes over in a folder.
        compressed: the reader opens files with `open_decompressed`: it also reads each ending followed by .gz, .zst,
            .bz2 or .xz.

    Raises:
        KindError: the name or a suffix is taken by another format.
    """
    def register(read: FileReaderFunction) -> FileReaderFunction:
        _check_name(name, read)
        reader = FileReader(read, suffixes, by_name, compressed, _code_digest(read))
        for suffix in reader.endings(by_name=True):
            owner = suffix_formats(by_name=True).get(suffix)
            if owner not in (None, name):
                raise KindError(f"data format '{name}': files that end in {suffix} are read by '{owner}'; leave the "
                                f"suffix out and set data.format={name}")
        FILE_READERS[name] = reader
        return read

    return register


def register_source(name: str) -> Callable[[SourceFunction], SourceFunction]:
    """Register the decorated function, which makes a `Source` from the data config, under a name.

    The function is called as `open(options)`; prepared tokens are made anew when the file that defines it changes.

    Args:
        name: the value of `data.format` that selects it.

    Raises:
        KindError: the name is taken by another format.
    """
    def register(opener: SourceFunction) -> SourceFunction:
        _check_name(name, opener)
        SOURCES[name] = SourceOpener(opener, _code_digest(opener))
        return opener

    return register


def known_formats() -> list[str]:
    """The values that `data.format` may have."""
    return [AUTO, *sorted([*FILE_READERS, *SOURCES])]


def check_format(name: str) -> None:
    """Raise ConfigError unless a data format of this name is registered."""
    if name not in known_formats():
        raise ConfigError("format", "unknown value", got=name, expected=f"one of {', '.join(known_formats())}",
                          hint=did_you_mean(name, known_formats())
                          or "a source of your own is registered with --import FILE")


def suffix_formats(by_name: bool = False) -> dict[str, str]:
    """The format that reads files with each ending: ending -> format.

    Args:
        by_name: with the endings that are read only where a file, a pattern or the format is named.
    """
    return {suffix: name for name, reader in FILE_READERS.items() for suffix in reader.endings(by_name)}


def _check_name(name: str, function: Callable) -> None:
    registered = FILE_READERS.get(name) or SOURCES.get(name)
    if registered is None and name != AUTO:
        return
    taken: Any = getattr(registered, "read", None) or getattr(registered, "open", None)
    if taken is None or _qualified_name(taken) != _qualified_name(function):
        raise KindError(f"data format '{name}' is taken{f' by {_qualified_name(taken)}' if taken else ''}; give "
                        f"{function.__name__} another name")


def _qualified_name(function: Callable) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _code_digest(function: Callable) -> str:
    """Digest of the file that defines a function outside hybridlm; empty for our own, whose format has a version."""
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    if function.__module__.partition(".")[0] == "hybridlm" or file is None:
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def utf8_document(data: bytes, policy: InvalidUTF8, where: Callable[[], str], offset: int = 0) -> Document:
    """Make a document of bytes that should be UTF-8.

    Args:
        data: the text.
        policy: `data.invalid_utf8`: refuse bytes that are not UTF-8, or replace them by U+FFFD.
        where: names the place in errors; called only when there is one.
        offset: bytes of the file before `data`.

    Raises:
        DataError: not UTF-8, and the policy is `error`.

    >>> utf8_document(b"caf\\xe9", "replace", lambda: "menu.txt")
    Document(text=b'caf\\xef\\xbf\\xbd', replaced=True)
    """
    try:
        data.decode("utf-8")
        return Document(data)
    except UnicodeDecodeError as error:
        if policy == "replace":
            return Document(data.decode("utf-8", "replace").encode(), replaced=True)
        at, byte = offset + error.start, data[error.start]
    if b"\0" in data:
        raise DataError(f"{where()}: not UTF-8 at byte {at} (0x{byte:02x}), and it holds zero bytes: this is not text, "
                        "or text in UTF-16; convert it to UTF-8, or leave it out")
    raise DataError(f"{where()}: not UTF-8 at byte {at} (0x{byte:02x}); convert the file, or set "
                    "data.invalid_utf8=replace to put U+FFFD there")


def missing_field(where: str, field_name: str, fields: list[str]) -> DataError:
    """The error for a text field that is not among `fields`."""
    hint = did_you_mean(field_name, fields)
    listed = ", ".join(map(str, fields[:20])) + (", ..." if len(fields) > 20 else "")
    return DataError(f"{where}: no field '{field_name}'; it has: {listed or 'none'}; set data.text_field"
                     + (f" ({hint})" if hint else ""))
