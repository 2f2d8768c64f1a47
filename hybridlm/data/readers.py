"""Files and data sets as documents: each reader yields the documents of one unit in a fixed order.

A document is UTF-8 text as bytes; an empty one is yielded too, so that whoever reads can count it.
"""

from __future__ import annotations

import gzip
import json
import mmap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hybridlm.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow

Policy = Literal["error", "replace"]
ROWS = 1024  # rows of a table read at a time


class Document(NamedTuple):
    """One text. `replaced`: bytes that were not UTF-8 became U+FFFD."""

    text: bytes
    replaced: bool = False


@dataclass(frozen=True)
class Unit:
    """A file or a data set. `documents(skip)` yields its documents from number `skip` on."""

    name: str
    size: int  # bytes, about: its part of the progress bar
    fingerprint: tuple[str | int, ...]  # changes when the content may have changed
    documents: Callable[[int], Iterator[Document]]
    path: str | None = None  # the real path of a file


def checked(data: bytes, policy: Policy, where: Callable[[], str], offset: int = 0) -> Document:
    """`data` as a document if it is UTF-8; else what the policy says. `offset`: where it starts in its file.

    Raises:
        DataError: not UTF-8 under the policy `error`.
    """
    try:
        data.decode("utf-8")
        return Document(data)
    except UnicodeDecodeError as error:
        if policy == "replace":
            return Document(data.decode("utf-8", "replace").encode(), replaced=True)
        at, byte = offset + error.start, data[error.start]
    raise DataError(f"{where()}: not UTF-8 at byte {at} (0x{byte:02x}); convert the file, or set "
                    "data.invalid_utf8=replace to put U+FFFD there")


def read_text(path: Path, policy: Policy, separator: str | None, skip: int) -> Iterator[Document]:
    """A file is one document, or the pieces between separators, without the line ends around them."""
    if separator is None:
        if skip == 0:
            yield checked(path.read_bytes(), policy, lambda: str(path))
        return
    if path.stat().st_size == 0:
        return
    mark = separator.encode()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = number = 0
        while start < len(data):
            end = data.find(mark, start)
            end = len(data) if end < 0 else end
            if number >= skip:
                piece = data[start:end].strip(b"\r\n")
                if piece or end < len(data):  # what follows the last separator is a document only if it has text
                    yield checked(piece, policy, lambda: str(path), data.find(piece, start))
            start, number = end + len(mark), number + 1


def read_jsonl(path: Path, policy: Policy, field: str, skip: int) -> Iterator[Document]:
    """One JSON object a line, gzip if the name ends in .gz. Blank lines and nulls are empty documents."""
    offset = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number > skip:
                    yield _json_document(line, policy, field, path, number, offset)
                offset += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut short ({error}); get it again") from None


def _json_document(line: bytes, policy: Policy, field: str, path: Path, number: int, offset: int) -> Document:
    if not line.strip():
        return Document(b"")

    def where() -> str:
        return f"{path}, line {number}"

    line, replaced = checked(line, policy, where, offset)
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where()}: not a JSON object ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where()}: holds {_kind(row)}; expected an object with the field '{field}'")
    if field not in row:
        raise missing_field(where(), field, list(row))
    text = row[field]
    if text is None:
        return Document(b"")
    if not isinstance(text, str):
        raise DataError(f"{where()}: field '{field}' holds {_kind(text)}; expected text")
    try:
        return Document(text.encode("utf-8"), replaced)
    except UnicodeEncodeError as error:
        if policy == "error":
            raise DataError(f"{where()}: field '{field}' holds half a character (\\u{ord(text[error.start]):x}); "
                            "mend it, or set data.invalid_utf8=replace") from None
    halves = text.encode("utf-16", "surrogatepass")  # joins pairs that were written as two escapes
    return Document(halves.decode("utf-16", "replace").encode(), replaced=True)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def missing_field(where: str, field: str, fields: list[str]) -> DataError:
    """The error for a text field that is not among `fields`."""
    hint = did_you_mean(field, fields)
    listed = ", ".join(map(str, fields[:20])) + (", ..." if len(fields) > 20 else "")
    return DataError(f"{where}: no field '{field}'; it has: {listed or 'none'}; set data.text_field"
                     + (f" ({hint})" if hint else ""))


def read_parquet(path: Path, policy: Policy, field: str, skip: int) -> Iterator[Document]:
    """The column `field` of a parquet file, row by row; row groups before `skip` are not read."""
    with open_parquet(path, field) as table:
        groups: list[int] = []
        row = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if not groups and rows <= skip - row:
                row += rows
            else:
                groups.append(group)
        for batch in table.iter_batches(batch_size=ROWS, row_groups=groups, columns=[field]):
            ahead = min(max(skip - row, 0), batch.num_rows)
            yield from column_documents(batch.column(0).slice(ahead), policy, str(path), field, row + ahead)
            row += batch.num_rows


def open_parquet(path: Path, field: str) -> Any:
    """The open file, once it is known to hold `field`.

    Raises:
        DataError: not a parquet file, or the field is not there.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a parquet file, or damaged ({reason}); get it again") from None
    if field not in table.schema_arrow.names:
        raise missing_field(str(path), field, table.schema_arrow.names)
    return table


def read_dataset(dataset: Any, label: str, policy: Policy, field: str, skip: int) -> Iterator[Document]:
    """The column `field` of a `datasets` data set, row by row."""
    if skip >= len(dataset):
        return
    rows = dataset.select_columns([field]).select(range(skip, len(dataset))).with_format("arrow")
    for table in rows.iter(batch_size=ROWS):
        yield from column_documents(table.column(field), policy, label, field, skip)
        skip += table.num_rows


def column_documents(column: pyarrow.Array | pyarrow.ChunkedArray, policy: Policy, label: str, field: str,
                     row: int) -> Iterator[Document]:
    """The texts of an arrow column; nulls are empty documents. `row` is the number of the first."""
    import pyarrow as pa

    try:
        texts = column.cast(pa.large_binary()).to_pylist()
    except pa.ArrowException:
        raise DataError(f"{label}: field '{field}' holds {column.type}; expected text") from None
    for number, text in enumerate(texts, start=row):
        yield checked(text or b"", policy, partial("{}, row {}".format, label, number))
