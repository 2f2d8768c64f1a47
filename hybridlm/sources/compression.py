"""Compressed files: gzip, Zstandard, bzip2 and xz, recognised by their first bytes, whatever their names end with."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hybridlm.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")  # behind a suffix such as .jsonl
_FIRST_BYTES = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
_BZIP2_BLOCK = b"1AY&SY"  # behind BZh and a digit
_CHUNK_BYTES = 1 << 18
_ZSTD_MAX_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes; the library alone takes 2^27


@contextmanager
def open_decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed where it is compressed.

    Args:
        path: the file. Several compressed files one after the other (`cat a.gz b.gz`) are read as one.

    Raises:
        DataError: the compressed file is damaged or cut short, also while it is read.
        OSError: it cannot be opened or read.
    """
    file = path.open("rb")
    kind = _compression(file.peek(10)[:10])
    try:
        with file if kind is None else io.BufferedReader(_DecompressedFile(file, kind), _CHUNK_BYTES) as content:
            yield content
    except _Damaged as error:
        raise DataError(f"{path}: the {kind} file is damaged or cut short ({error}); get it again") from None


def _compression(start: bytes) -> str | None:
    if start[:3] == b"BZh" and start[4:10] == _BZIP2_BLOCK:
        return "bzip2"
    return next((kind for first, kind in _FIRST_BYTES.items() if start.startswith(first)), None)


class _Damaged(Exception):
    """Compressed data that cannot be decompressed, or that ends too early."""


def _decompressor(kind: str) -> Any:
    if kind == "gzip":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with gzip's header and checksum
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    if kind == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES).decompressobj()


def _errors_of(kind: str) -> tuple[type[Exception], ...]:
    """Exceptions that decompressing damaged data of a kind raises."""
    if kind == "zstd":
        import zstandard

        return (zstandard.ZstdError,)
    return zlib.error, lzma.LZMAError, OSError, EOFError


class _DecompressedFile(io.RawIOBase):
    """Reads all compressed streams of a file, one after the other, with nothing but zero bytes between and behind them.

    The libraries' own readers take damage at the start of a later stream for the end of the file (bz2, lzma), or a file
    that is cut short for a whole one (zstandard).
    """

    def __init__(self, file: IO[bytes], kind: str):
        self._file, self._kind = file, kind
        self._errors = _errors_of(kind)
        self._stream: Any = None
        self._ahead = b""  # compressed bytes behind the last stream
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            compressed = self._ahead or self._file.read(_CHUNK_BYTES)
            self._ahead = b""
            if not compressed:
                if self._stream is not None:
                    raise _Damaged("it ends too early")
                return 0
            if self._stream is None:
                compressed = compressed.lstrip(b"\0")
                if not compressed:
                    continue
                self._stream = _decompressor(self._kind)
            try:
                self._content = memoryview(self._stream.decompress(compressed))
            except self._errors as error:
                raise _Damaged(str(error)) from error
            if self._stream.eof:
                self._ahead, self._stream = self._stream.unused_data, None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
