"""JSON lines, also compressed: a line is one document. A file that is one JSON array is read element by element."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError
from hybridlm.sources.compression import open_decompressed
from hybridlm.sources.contract import Document, SourceOptions, missing_field, register_file_reader, utf8_document

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@register_file_reader("jsonl", ".jsonl", ".ndjson", by_name=(".json",), compressed=True)
def read_jsonl(path: Path, options: SourceOptions, skip: int) -> Iterator[Document]:
    """Yield the text of one JSON object per line; blank lines and nulls are empty documents.

    Args:
        path: the file, possibly compressed.
        options: `text_field` and `invalid_utf8`.
        skip: lines, or elements of an array, to leave out at the start.

    Raises:
        DataError: a damaged file, or a line without a text in the field; the line is named.
    """
    offset = 0  # bytes before the line
    with open_decompressed(path) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
                yield from _read_array(line + lines.read(), options, path, skip)
                return
            if number > skip:
                yield _read_line(line, options, f"{path}, line {number}", offset)
            offset += len(line)


def _read_line(line: bytes, options: SourceOptions, where: str, offset: int) -> Document:
    if not line.strip():
        return Document(b"")
    line, replaced = utf8_document(line, options.invalid_utf8, lambda: where, offset)
    return _read_row(_parse(line, where, "one object per line"), options, where, replaced)


def _read_array(data: bytes, options: SourceOptions, path: Path, skip: int) -> Iterator[Document]:
    """Yield the texts of a JSON array of objects, which is read as a whole."""
    text, replaced = utf8_document(data, options.invalid_utf8, lambda: str(path))
    rows = _parse(text, str(path), "an array of objects, or one object per line")
    for number, row in enumerate(rows[skip:], start=skip + 1):
        yield _read_row(row, options, f"{path}, element {number}", replaced)


def _parse(text: bytes, where: str, expected: str) -> Any:
    try:
        # Whole numbers are read as floats: Python refuses to convert more than 4,300 digits, and no number is used.
        return json.loads(text, parse_int=float)
    except RecursionError:
        raise DataError(f"{where}: its lists or objects are nested too deeply to be read; take this line out") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at character {error.pos + 1}); expected {expected}") from None


def _read_row(row: Any, options: SourceOptions, where: str, replaced: bool) -> Document:
    field = options.text_field
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
