"""JSON lines, plain or compressed by gzip: a line is one document."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError
from hybridlm.sources.contract import Document, SourceOptions, missing_field, register_file_reader, utf8_document


@register_file_reader("jsonl", ".jsonl", ".jsonl.gz")
def read_jsonl(path: Path, options: SourceOptions, skip: int) -> Iterator[Document]:
    """Yield the text of one JSON object per line; blank lines and nulls are empty documents.

    Args:
        path: the file, compressed if its name ends in .gz.
        options: `text_field` and `invalid_utf8`.
        skip: lines to leave out at the start.

    Raises:
        DataError: a damaged file, or a line without a text in the field; the line is named.
    """
    offset = 0  # bytes before the line
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number > skip:
                    yield _read_line(line, options, f"{path}, line {number}", offset)
                offset += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut short ({error}); get it again") from None


def _read_line(line: bytes, options: SourceOptions, where: str, offset: int) -> Document:
    if not line.strip():
        return Document(b"")
    field = options.text_field
    line, replaced = utf8_document(line, options.invalid_utf8, lambda: where, offset)
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not a JSON object ({error}); expected one object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds {_type_name(row)}; expected an object with the field '{field}'")
    if field not in row:
        raise missing_field(where, field, list(row))
    text = row[field]
    if text is None:
        return Document(b"")
    if not isinstance(text, str):
        raise DataError(f"{where}: field '{field}' holds {_type_name(text)}; expected text")
    try:
        return Document(text.encode("utf-8"), replaced)
    except UnicodeEncodeError as error:
        if options.invalid_utf8 == "error":
            raise DataError(f"{where}: field '{field}' holds half a character (\\u{ord(text[error.start]):x}); "
                            "mend it, or set data.invalid_utf8=replace") from None
    surrogates = text.encode("utf-16", "surrogatepass")  # joins pairs that were written as two escapes
    return Document(surrogates.decode("utf-16", "replace").encode(), replaced=True)


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
