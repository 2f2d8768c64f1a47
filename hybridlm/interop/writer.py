"""Writing safetensors as the tensors come, in any order, and a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hybridlm.errors import CheckpointError
from hybridlm.interop.mapping import Spec
from hybridlm.tensor_storage import DTYPE_BY_CODE

CODES = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}
SHARD_BYTES = 5 * 10**9  # what save_pretrained calls 5GB
HEADROOM = 64 * 2**20  # bytes on disk for headers, configs and tokenizer


class ShardWriter:
    """Safetensors files whose whole layout is known before the first tensor.

    One file `stem.safetensors`, or, beyond `shard_bytes`, numbered shards with the index that transformers reads.
    """

    def __init__(self, folder: Path, specs: Iterable[tuple[str, Spec]], *, stem: str = "model",
                 shard_bytes: int = SHARD_BYTES, index: bool = True):
        shards = _shards(specs, shard_bytes)
        self._places: dict[str, tuple[int, int, Spec]] = {}
        self._open: list[int] = []
        self._left: set[str] = set()
        weight_map: dict[str, str] = {}
        total = sum(spec.num_bytes for shard in shards for spec in shard.values())
        check_space(folder, total)
        try:
            for number, shard in enumerate(shards, start=1):
                part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
                file = folder / f"{stem}{part}.safetensors"
                self._create(file, shard)
                weight_map.update(dict.fromkeys(shard, file.name))
        except BaseException:
            self.close()
            raise
        if index and len(shards) > 1:
            text = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            file = folder / f"{stem}.safetensors.index.json"
            file.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")

    def _create(self, file: Path, shard: dict[str, Spec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        # Wide dtypes first: readers view the bytes in place, so each tensor must start at a multiple of its item size.
        order = sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)
        start, offsets = 0, {}
        for name, spec in order:
            offsets[name] = start
            header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape),
                            "data_offsets": [start, start + spec.num_bytes]}
            start += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._open.append(descriptor)
        _write_at(descriptor, memoryview(struct.pack("<Q", len(text)) + text), 0)
        os.truncate(descriptor, 8 + len(text) + start)
        for name, offset in offsets.items():
            self._places[name] = (descriptor, 8 + len(text) + offset, shard[name])
            self._left.add(name)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor`, cast to the dtype announced for it, at its place."""
        descriptor, start, spec = self._places[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} was announced as {list(spec.shape)}; got {list(tensor.shape)}")
        tensor = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous()
        if tensor.numel():
            _write_at(descriptor, memoryview(tensor.view(-1).view(torch.uint8).numpy()), start)  # type: ignore[arg-type]
        self._left.discard(name)

    def finish(self) -> None:
        """Flush and close; every announced tensor must have been written."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were announced but not written, {min(self._left)} among them")
        for descriptor in self._open:
            os.fsync(descriptor)
        self.close()

    def close(self) -> None:
        for descriptor in self._open:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._open.clear()


def _shards(specs: Iterable[tuple[str, Spec]], limit: int) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    used = 0
    for name, spec in specs:
        if shards[-1] and used + spec.num_bytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += spec.num_bytes
    return shards


def _write_at(descriptor: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], start + done)


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError unless `num_bytes` fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if num_bytes + HEADROOM > free:
        raise CheckpointError(f"no space for the checkpoint on the disk of {folder.parent}: it needs "
                              f"{num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")


@contextlib.contextmanager
def draft(dest: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `dest` when the block ends well and deleted when it does not.

    Raises:
        CheckpointError: `dest` is there and not an empty folder, or the disk is full.
    """
    dest = dest.expanduser()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise CheckpointError(f"{dest} is there already{' and not empty' if dest.is_dir() else ' and not a folder'}; "
                              "nothing is overwritten: name a new folder")
    folder = dest.parent / f".tmp-{dest.name}-{os.getpid()}"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        if dest.exists():
            dest.rmdir()
        folder.rename(dest)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"the disk of {dest.parent} is full; nothing was left behind") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise CheckpointError(f"cannot write {dest}: {error.strerror}") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
