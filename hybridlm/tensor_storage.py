"""Tensors in safetensors files, read completely or in part without mapping the files into memory, and the names under
which a model's tensors are stored.

A file's header is checked against the file before any tensor is read.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.errors import CheckpointError

DTYPE_BY_CODE = {  # the codes of the safetensors format
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
log = logging.getLogger("hybridlm")

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that begins at byte `start` of a file. Nothing of it is in memory until it is read."""

    name: str
    file: Path
    start: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def num_bytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return self.shape.numel() * self.dtype.itemsize

    def dim(self) -> int:
        """Number of dimensions, as of a torch tensor."""
        return len(self.shape)

    def chunk(self, number: int) -> list[StoredTensor]:
        """Cut the tensor along its first dimension into `number` equal tensors; `number` divides that dimension."""
        rows = self.shape[0] // number
        shape = torch.Size([rows, *self.shape[1:]])
        return [replace(self, start=self.start + index * self.num_bytes // number, shape=shape)
                for index in range(number)]

    def read(self) -> Tensor:
        """Read the whole tensor."""
        return self.elements(0, self.shape.numel()).view(self.shape)

    def elements(self, first: int, count: int) -> Tensor:
        """Read elements `first` to `first + count` of the flattened tensor.

        Returns:
            [count], in the dtype of the file.

        Raises:
            CheckpointError: the file has become shorter.
        """
        tensor = torch.empty(count, dtype=self.dtype)
        buffer = memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start + first * self.dtype.itemsize)
            done = 0
            while done < len(buffer):
                got = stream.readinto(buffer[done:])
                if not got:
                    raise CheckpointError(f"{self.file} ended in the middle of '{self.name}': it is truncated")
                done += got
        return tensor


def stored_tensors(folder: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """List all tensors of `stem.safetensors`, or of the shards that its index or its name pattern gives.

    Raises:
        CheckpointError: no such file, or one that is not what its header says.
    """
    found: dict[str, StoredTensor] = {}
    for file in shard_files(folder, stem):
        for name, stored in _header(file).items():
            if name in found:
                raise CheckpointError(f"'{name}' stands in two files: {found[name].file.name} and {file.name}")
            found[name] = stored
    return found


def read_tensors(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Read every tensor of `stem`, one at a time; yields name and tensor."""
    for name, stored in stored_tensors(folder, stem).items():
        yield name, stored.read()


def shard_files(folder: Path, stem: str = "model") -> list[Path]:
    """List the safetensors files of a checkpoint.

    Where a single file stands beside the index of shards, the single file is read, as transformers does.

    Raises:
        CheckpointError: none, only pickles, a broken index, or a shard that is missing.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if index.is_file() and single.is_file():
        log.warning("%s has %s and %s: the first is read, as transformers does; delete the one that is out of date",
                    folder, single.name, index.name)
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index} is not a safetensors index: expected JSON with a 'weight_map'") from None
        files = [folder / str(name) for name in names]
        for file in files:
            if not file.resolve().is_file() or file.parent.resolve() != folder.resolve():
                raise CheckpointError(f"the index of {folder} names the shard '{file.name}', which is not there; "
                                      "fetch it again")
        return files
    files = sorted([*folder.glob(single.name), *folder.glob(f"{stem}-*-of-*.safetensors")])
    if files:
        return files
    pickles = sorted(f.name for f in folder.glob("*") if f.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(f"{folder} holds only pickle files ({pickles[0]}): unpickling runs code from the file. "
                              "Convert it to safetensors where you trust it: load it with transformers and call "
                              "save_pretrained, or take a revision that has *.safetensors")
    raise CheckpointError(f"no {stem}*.safetensors in {folder}: expected a checkpoint folder")


def _header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(f"{file} is not a whole safetensors file: {size} bytes, "
                                  + ("no header" if length < 0 else f"a header of {length} bytes"))
        text = stream.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in entries.items()
                  if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"the header of {file} is corrupt; fetch the file again") from None
    end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise CheckpointError(f"{file} is {'truncated' if size < end else 'damaged'}: {size} bytes, its header "
                              f"describes {end}; fetch the file again")
    return tensors


def _stored(file: Path, name: str, entry: dict[str, Any], base: int) -> StoredTensor:
    code = entry["dtype"]
    if code not in DTYPE_BY_CODE:
        raise CheckpointError(f"'{name}' in {file.name} has dtype {code}; known are {', '.join(DTYPE_BY_CODE)}")
    start, stop = (int(n) for n in entry["data_offsets"])
    stored = StoredTensor(name, file, base + start, DTYPE_BY_CODE[code], torch.Size(entry["shape"]))
    if stop - start != stored.num_bytes or start < 0:
        raise CheckpointError(f"'{name}' in {file.name} takes {stop - start} bytes, its shape {list(stored.shape)} "
                              f"needs {stored.num_bytes}: the file is corrupt; fetch it again")
    return stored


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Collect the parameters and saved buffers of a model; a tensor with several names (tied) stands under its first.

    >>> layer = nn.Linear(2, 3)
    >>> sorted(unique_tensors(nn.ModuleDict({"a": layer, "b": layer})))
    ['a.bias', 'a.weight']
    """
    seen: set[int] = set()
    unique = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def full_shape(weight: Any) -> torch.Size:
    """Return the shape of a whole weight, of which this rank may hold only a shard (DeepSpeed ZeRO-3)."""
    return getattr(weight, "ds_shape", weight.shape)
