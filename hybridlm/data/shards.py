"""Token shards on disk, and the stream they make.

A shard is two files: NAME.bin, the ids of its documents one after the other (uint16 or uint32, little endian;
every document ends with the end-of-text id), and NAME.ends, the position after each document (int64, little
endian). `manifest.json` lists the shards of a folder with sizes and SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.errors import DataError
from hybridlm.files import write_json

FORMAT = 1  # version of the files on disk
MANIFEST = "manifest.json"
VERIFIED = "verified.json"
HASH_AT_START_MAX_BYTES = 1 << 28  # above this, checksums are not computed at every start (half a second)
END_TYPE = np.dtype("<i8")


@dataclass(frozen=True)
class Shard:
    """The manifest's entry of one shard; `bytes` counts UTF-8 bytes of text."""

    name: str
    dtype: str
    tokens: int
    documents: int
    bytes: int
    longest: int  # tokens of the longest document
    sha256: str
    ends_sha256: str

    def sizes(self) -> dict[str, int]:
        """Bytes of each file on disk."""
        return {f"{self.name}.bin": self.tokens * np.dtype(self.dtype).itemsize,
                f"{self.name}.ends": self.documents * END_TYPE.itemsize}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {f"{self.name}.bin": self.sha256, f"{self.name}.ends": self.ends_sha256}


class ShardWriter:
    """Writes one shard under temporary names; `finish` flushes it to disk and renames it."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.folder, self.name, self.dtype = folder, name, dtype
        self.tokens = self.bytes = self.longest = 0
        self.ends: list[int] = []
        self.hash = hashlib.sha256()
        self.file = (folder / f"{name}.bin.tmp").open("wb")

    def add(self, ids: np.ndarray, eos_id: int, num_bytes: int) -> None:
        """Append a document's ids and the end of text."""
        data = np.empty(len(ids) + 1, dtype=self.dtype)
        data[:-1] = ids
        data[-1] = eos_id
        self.hash.update(data.data)
        self.file.write(data.data)
        self.tokens += len(data)
        self.bytes += num_bytes
        self.longest = max(self.longest, len(data))
        self.ends.append(self.tokens)

    def finish(self) -> Shard:
        """Flush the files to disk, give them their names, and return the manifest's entry."""
        ends = np.array(self.ends, dtype=END_TYPE).tobytes()
        _flush(self.file)
        with (self.folder / f"{self.name}.ends.tmp").open("wb") as file:
            file.write(ends)
            _flush(file)
        for kind in ("bin", "ends"):
            os.replace(self.folder / f"{self.name}.{kind}.tmp", self.folder / f"{self.name}.{kind}")
        return Shard(self.name, self.dtype.str, self.tokens, len(self.ends), self.bytes, self.longest,
                     self.hash.hexdigest(), hashlib.sha256(ends).hexdigest())

    def close(self) -> None:
        """Release the file without finishing it."""
        self.file.close()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def check_shard(folder: Path, shard: Shard, hashes: bool) -> None:
    """Compare a shard's files with the manifest.

    Raises:
        DataError: a file is missing, cut short or altered; it is named.
    """
    for name, size in shard.sizes().items():
        file = folder / name
        fault = ""
        if not file.is_file():
            fault = "is missing"
        elif file.stat().st_size != size:
            fault = f"has {file.stat().st_size} bytes, {size} were written"
        elif hashes:
            with file.open("rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() != shard.hashes()[name]:
                    fault = "does not match its checksum"
        if fault:
            raise DataError(f"token shard {file} {fault}; delete the folder {folder} to prepare it again")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        DataError: it is damaged, or of another format.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{file}: cannot be read; delete the folder {folder} to prepare it again") from None
    if version != FORMAT:
        raise DataError(f"{file}: format {version}, this version reads {FORMAT}; prepare the data again")
    return manifest


def shards_of(manifest: dict[str, Any], part: str) -> list[Shard]:
    """The shards of `train` or `validation` in a manifest."""
    return [Shard(**shard) for shard in manifest["shards"][part]]


def verify(folder: Path, manifest: dict[str, Any], force: bool = False) -> None:
    """Compare the shards of a folder with its manifest.

    Sizes are compared always. SHA-256 is, if `force` is set, if the shards are small (HASH_AT_START_MAX_BYTES), on the
    first open, and whenever the size or time of a file has changed.

    Raises:
        DataError: see `check_shard`.
    """
    shards = [shard for part in manifest["shards"] for shard in shards_of(manifest, part)]
    for shard in shards:
        check_shard(folder, shard, hashes=False)
    now = {name: [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns]
           for shard in shards for name in shard.sizes()}
    force = force or sum(size for size, _ in now.values()) <= HASH_AT_START_MAX_BYTES
    known = None
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
    if force or known != now:
        for shard in shards:
            check_shard(folder, shard, hashes=True)
    if known != now:
        with contextlib.suppress(OSError):  # a cache that cannot be written is verified every time
            write_json(folder / VERIFIED, now)


class TokenStore:
    """The documents of several shards as one stream of `num_tokens` ids, memory-mapped.

    `byte_lengths` int64 [vocab]: UTF-8 bytes of each id. `weight` and `name` are those of its source.
    """

    def __init__(self, shards: Sequence[tuple[Path, Shard]], byte_lengths: np.ndarray, *, name: str = "",
                 weight: float = 1.0):
        self.shards = [(folder, shard) for folder, shard in shards if shard.tokens]
        self.byte_lengths, self.name, self.weight = byte_lengths, name, weight
        self.starts = np.cumsum([0] + [shard.tokens for _, shard in self.shards])
        self.num_tokens = int(self.starts[-1])
        self.num_documents = sum(shard.documents for _, shard in self.shards)
        self.num_bytes = sum(shard.bytes for _, shard in self.shards)
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __repr__(self) -> str:
        return f"TokenStore({self.name!r}, tokens={self.num_tokens}, documents={self.num_documents})"

    def _open(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._maps:
            folder, shard = self.shards[index]
            self._maps[index] = (np.memmap(folder / f"{shard.name}.bin", dtype=shard.dtype, mode="r"),
                                 np.memmap(folder / f"{shard.name}.ends", dtype=END_TYPE, mode="r"))
        return self._maps[index]

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, start in it, stop in it) of the shards that hold tokens start .. stop-1."""
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            base, limit = int(self.starts[index]), int(self.starts[index + 1])
            yield index, start - base, min(stop, limit) - base
            start, index = min(stop, limit), index + 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read the ids at start .. stop-1 of the stream, int64.

        Raises:
            IndexError: outside the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of a stream of {self.num_tokens}")
        parts = [self._open(i)[0][a:b] for i, a, b in self._ranges(start, stop)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts], dtype=np.int64, casting="unsafe")

    def ends(self, start: int, stop: int) -> np.ndarray:
        """Ends e of documents with start < e, up to and including the first one at or after `stop`.

        Returns:
            int64, counted from the start of the stream; the token at e-1 is an end of text.
        """
        found = []
        for i, a, b in self._ranges(start, stop):
            ends = self._open(i)[1]
            first, last = np.searchsorted(ends, a, side="right"), np.searchsorted(ends, b, side="left")
            found.append(ends[first:last + 1] + self.starts[i])
        return np.concatenate([np.zeros(0, dtype=np.int64), *found])

    def documents(self, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield the ids of every document, its end of text included; only of the first `stop` tokens if given."""
        limit = self.num_tokens if stop is None else min(stop, self.num_tokens)
        start = 0
        for index in range(len(self.shards)):
            for end in self._open(index)[1]:
                if start >= limit:
                    return
                end = int(end + self.starts[index])
                yield self.read(start, min(end, limit))
                start = end
