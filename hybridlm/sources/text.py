"""Plain text files, also compressed: a file is one document, or several that a separator parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hybridlm.sources.compression import open_decompressed
from hybridlm.sources.contract import Document, SourceOptions, register_file_reader, utf8_document

CHUNK_BYTES = 1 << 20


@register_file_reader("text", ".txt", ".md", ".py", compressed=True)
def read_text(path: Path, options: SourceOptions, skip: int) -> Iterator[Document]:
    """Yield the file, or the texts between separators without the line ends around them.

    Args:
        path: the file, possibly compressed.
        options: `document_separator` (null: the file is one document) and `invalid_utf8`.
        skip: documents to leave out at the start.

    Raises:
        DataError: bytes that are not UTF-8, or a damaged file.
    """
    def where() -> str:
        return str(path)

    if options.document_separator is None and skip > 0:
        return
    with open_decompressed(path) as file:
        if options.document_separator is None:
            yield utf8_document(file.read(), options.invalid_utf8, where)
            return
        for number, (offset, text) in enumerate(_between(file, options.document_separator.encode())):
            if number >= skip:
                inner = text.lstrip(b"\r\n")
                yield utf8_document(inner.rstrip(b"\r\n"), options.invalid_utf8, where,
                                    offset + len(text) - len(inner))


def _between(file: IO[bytes], separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the texts between separators, each with its place in the file; line ends behind the last are no text."""
    waiting = bytearray()
    searched = offset = 0  # bytes of `waiting` that hold no separator; place of its first byte
    while chunk := file.read(CHUNK_BYTES):
        waiting += chunk
        start = 0
        while (end := waiting.find(separator, max(start, searched))) >= 0:
            yield offset + start, bytes(waiting[start:end])
            start = searched = end + len(separator)
        del waiting[:start]
        offset += start
        searched = max(0, len(waiting) - len(separator) + 1)
    if waiting.strip(b"\r\n"):
        yield offset, bytes(waiting)
