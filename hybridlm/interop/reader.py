"""Reading tensors one at a time: from safetensors files without mapping them into memory, or from a state dict.

Headers are checked against the files before anything is read, and fp8 weights in DeepSeek's block-scale form are
dequantised as they are read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.interop.mapping import Spec

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SCALE = "_scale_inv"


class TensorSource(Protocol):
    """Tensors by name."""

    @property
    def where(self) -> str: ...

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    def read(self, name: str) -> Tensor: ...


class StateDict:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str = "the model"):
        self.where, self.tensors = where, tensors
        self.specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach()


@dataclass(frozen=True)
class _Place:
    file: Path
    start: int
    spec: Spec


class SafetensorsFolder:
    """All tensors of `stem.safetensors`, or of the shards its index or its name pattern lists."""

    def __init__(self, folder: Path, stem: str = "model"):
        self.where = str(folder)
        self._places: dict[str, _Place] = {}
        for file in shard_files(folder, stem):
            for name, place in _header(file).items():
                if name in self._places:
                    raise CheckpointError(f"'{name}' stands in two files: {self._places[name].file.name} and "
                                          f"{file.name}")
                self._places[name] = place
        self.specs: Mapping[str, Spec] = {name: place.spec for name, place in self._places.items()}

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        tensor = torch.empty(place.spec.shape, dtype=place.spec.dtype)
        buffer: Any = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        buffer = memoryview(buffer)
        with place.file.open("rb", buffering=0) as stream:
            stream.seek(place.start)
            done = 0
            while done < len(buffer):
                count = stream.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(f"{place.file} ended in the middle of '{name}': it is truncated")
                done += count
        return tensor


def shard_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        CheckpointError: none, only pickles, a broken index, or a shard that is missing.
    """
    index = folder / f"{stem}.safetensors.index.json"
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
    files = sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")])
    if files:
        return files
    pickles = sorted(f.name for f in folder.glob("*") if f.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{folder} holds only pickle files ({pickles[0]}): unpickling runs code from the file. "
                              "Convert it to safetensors where you trust it: load it with transformers and call "
                              "save_pretrained, or take a revision that has *.safetensors")
    raise CheckpointError(f"no {stem}*.safetensors in {folder}: expected a checkpoint folder of transformers")


def _header(file: Path) -> dict[str, _Place]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= HEADER_LIMIT or 8 + length > size:
            raise CheckpointError(f"{file} is not a whole safetensors file: {size} bytes, "
                                  + ("no header" if length < 0 else f"a header of {length} bytes"))
        text = stream.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        places = {name: _place(file, name, entry, 8 + length) for name, entry in entries.items()
                  if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"the header of {file} is corrupt; fetch the file again") from None
    end = max((place.start + place.spec.num_bytes for place in places.values()), default=8 + length)
    if end != size:
        raise CheckpointError(f"{file} is {'truncated' if size < end else 'damaged'}: {size} bytes, its header "
                              f"describes {end}; fetch the file again")
    return places


def _place(file: Path, name: str, entry: dict[str, Any], base: int) -> _Place:
    code = entry["dtype"]
    if code not in DTYPES:
        raise CheckpointError(f"'{name}' in {file.name} has dtype {code}; known are {', '.join(DTYPES)}")
    spec = Spec(DTYPES[code], tuple(int(n) for n in entry["shape"]))
    start, stop = (int(n) for n in entry["data_offsets"])
    if stop - start != spec.num_bytes or start < 0:
        raise CheckpointError(f"'{name}' in {file.name} takes {stop - start} bytes, its shape {list(spec.shape)} needs "
                              f"{spec.num_bytes}: the file is corrupt; fetch it again")
    return _Place(file, base + start, spec)


class Dequantized:
    """fp8 weights with one scale for each block (DeepSeek-V3's format) as bf16: w[i, j] * scale[i // b, j // b]."""

    def __init__(self, source: TensorSource, block: tuple[int, int]):
        self.where, self.source, self.block = source.where, source, block
        self.specs = {}
        for name, spec in source.specs.items():
            if name.endswith(SCALE):
                continue
            scaled = spec.dtype == torch.float8_e4m3fn and name + SCALE in source.specs
            self.specs[name] = Spec(torch.bfloat16, spec.shape) if scaled else spec
            if scaled:
                grid = tuple(math.ceil(n / b) for n, b in zip(spec.shape, block, strict=True))
                if source.specs[name + SCALE].shape != grid:
                    raise CheckpointError(f"'{name}{SCALE}' is {list(source.specs[name + SCALE].shape)}; blocks of "
                                          f"{list(block)} over {list(spec.shape)} need {list(grid)}")

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        if tensor.dtype != torch.float8_e4m3fn or name + SCALE not in self.source.specs:
            return tensor
        scale = self.source.read(name + SCALE).float()
        out = torch.empty(tensor.shape, dtype=torch.bfloat16)
        rows, columns = self.block
        for i in range(scale.shape[0]):  # by rows of blocks: no fp32 copy of the whole weight
            part = slice(i * rows, (i + 1) * rows)
            wide = scale[i].repeat_interleave(columns)[: tensor.shape[1]]
            out[part] = (tensor[part].float() * wide).to(torch.bfloat16)
        return out


def dequantized(source: TensorSource, quantization: Mapping[str, Any] | None) -> TensorSource:
    """`source` with its weights in bf16, as the config's `quantization_config` asks.

    Raises:
        ConfigError: a form of quantisation that is not known.
    """
    if not quantization:
        return source
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list | tuple) or len(block) != 2:
        got = method if method != "fp8" else f"fp8 with weight_block_size={block}"
        raise ConfigError("quantization_config", "this quantisation cannot be read", got=got,
                          expected="unquantised weights, or fp8 with two-dimensional block scales (DeepSeek-V3)",
                          hint="dequantise the checkpoint with the tool that made it")
    return Dequantized(source, (int(block[0]), int(block[1])))
