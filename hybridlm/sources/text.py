"""Plain text files: a file is one document, or several that a separator parts."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from hybridlm.sources.contract import Document, SourceOptions, register_file_reader, utf8_document


@register_file_reader("text", ".txt", ".md", ".py")
def read_text(path: Path, options: SourceOptions, skip: int) -> Iterator[Document]:
    """Yield the file, or the texts between separators without the line ends around them.

    Args:
        path: the file.
        options: `document_separator` (null: the file is one document) and `invalid_utf8`.
        skip: documents to leave out at the start.

    Raises:
        DataError: bytes that are not UTF-8.
    """
    def where() -> str:
        return str(path)

    if options.document_separator is None:
        if skip == 0:
            yield utf8_document(path.read_bytes(), options.invalid_utf8, where)
        return
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return
    separator = options.document_separator.encode()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = number = 0
        while start < len(data):
            end = data.find(separator, start)
            end = len(data) if end < 0 else end
            if number >= skip:
                text = data[start:end].strip(b"\r\n")
                if text or end < len(data):  # what follows the last separator is a document only if it has text
                    yield utf8_document(text, options.invalid_utf8, where, data.find(text, start))
            start = end + len(separator)
            number += 1
