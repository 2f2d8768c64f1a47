"""Writes safetensors files tensor by tensor, in any order, into a folder that appears complete or not at all."""

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
from hybridlm.interop.tensor_rules import TensorSpec
from hybridlm.tensor_storage import DTYPE_BY_CODE

CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}
SHARD_BYTES = 5 * 10**9  # per file, the 5GB of save_pretrained
HEADROOM_BYTES = 64 * 2**20  # on disk for headers, configs and tokenizer


class SafetensorsWriter:
    """Writes safetensors files whose names, shapes and dtypes are all known before the first tensor.

    There is one file `stem.safetensors`, or beyond `shard_bytes` numbered shards and the index that transformers reads.

    Args:
        folder: where the files go.
        specs: name, dtype and shape of every tensor, in the order of the shards.
        stem: start of the file names.
        shard_bytes: largest number of bytes per file.
        index: write the index of several shards.

    Raises:
        CheckpointError: the disk has no space for all of it.
    """

    def __init__(self, folder: Path, specs: Iterable[tuple[str, TensorSpec]], *, stem: str = "model",
                 shard_bytes: int = SHARD_BYTES, index: bool = True):
        shards = _divide_into_shards(specs, shard_bytes)
        self._positions: dict[str, tuple[int, int, TensorSpec]] = {}
        self._descriptors: list[int] = []
        self._unwritten: set[str] = set()
        weight_map: dict[str, str] = {}
        total = sum(spec.num_bytes for shard in shards for spec in shard.values())
        check_disk_space(folder, total)
        try:
            for number, shard in enumerate(shards, start=1):
                suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
                file = folder / f"{stem}{suffix}.safetensors"
                self._create(file, shard)
                weight_map.update(dict.fromkeys(shard, file.name))
        except BaseException:
            self.close()
            raise
        if index and len(shards) > 1:
            text = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            file = folder / f"{stem}.safetensors.index.json"
            file.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")

    def _create(self, file: Path, shard: dict[str, TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        # Wide dtypes first: readers view the bytes in place, so each tensor must start at a multiple of its item size.
        order = sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)
        start = 0
        offsets = {}
        for name, spec in order:
            offsets[name] = start
            header[name] = {"dtype": CODE_BY_DTYPE[spec.dtype], "shape": list(spec.shape),
                            "data_offsets": [start, start + spec.num_bytes]}
            start += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        _write_at(descriptor, memoryview(struct.pack("<Q", len(text)) + text), 0)
        os.truncate(descriptor, 8 + len(text) + start)
        for name, offset in offsets.items():
            self._positions[name] = (descriptor, 8 + len(text) + offset, shard[name])
            self._unwritten.add(name)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write `tensor`, cast to the dtype in its spec.

        Raises:
            ValueError: it has another shape than its spec.
        """
        descriptor, start, spec = self._positions[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} was announced as {list(spec.shape)}; got {list(tensor.shape)}")
        tensor = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous()
        if tensor.numel():
            _write_at(descriptor, memoryview(tensor.view(-1).view(torch.uint8).numpy()), start)  # type: ignore[arg-type]
        self._unwritten.discard(name)

    def finish(self) -> None:
        """Flush and close.

        Raises:
            ValueError: some tensors were not written.
        """
        if self._unwritten:
            raise ValueError(f"{len(self._unwritten)} tensors were announced but not written, {min(self._unwritten)} "
                             "among them")
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        self.close()

    def close(self) -> None:
        """Close the files, complete or not."""
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()


def _divide_into_shards(specs: Iterable[tuple[str, TensorSpec]], limit: int) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in specs:
        if shards[-1] and used + spec.num_bytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += spec.num_bytes
    return shards


def _write_at(descriptor: int, data: memoryview, start: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], start + written)


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Check that `num_bytes` fit on the disk of `folder`.

    Raises:
        CheckpointError: they do not.
    """
    free = shutil.disk_usage(folder).free
    needed = num_bytes + HEADROOM_BYTES
    if needed > free:
        raise CheckpointError(f"no space for the checkpoint on the disk of {folder.parent}: it needs "
                              f"{needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")


@contextlib.contextmanager
def create_folder(dest: Path) -> Iterator[Path]:
    """A context with a folder to fill: it becomes `dest` when the block ends well, and is deleted otherwise.

    Raises:
        CheckpointError: `dest` exists and is not an empty folder, or the disk is full.
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
