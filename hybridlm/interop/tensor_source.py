"""Reads tensors one at a time, from safetensors files or from a state dict.

fp8 weights with the block scales of DeepSeek are dequantised when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.interop.tensor_rules import TensorSpec
from hybridlm.tensor_storage import StoredTensor, stored_tensors

SCALE_SUFFIX = "_scale_inv"


class TensorSource(Protocol):
    """Tensors by name.

    Attributes:
        where: what it reads, for errors.
        specs: dtype and shape of every tensor.
    """

    @property
    def where(self) -> str: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> Tensor: ...


class StateDictSource:
    """Reads tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str = "the model"):
        self.where = where
        self.tensors = tensors
        self.specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach()


class SafetensorsSource:
    """Reads the safetensors files of a checkpoint; `stored` gives the same tensors other names."""

    def __init__(self, folder: Path, stored: Mapping[str, StoredTensor] | None = None):
        self.where = str(folder)
        self._stored = stored_tensors(folder) if stored is None else stored
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._stored.items()}

    def read(self, name: str) -> Tensor:
        return self._stored[name].read()


class DequantizedSource:
    """Reads fp8 weights with one scale per block (the format of DeepSeek-V3) as bf16.

    A value is w[i, j] * scale[i // b, j // b], with blocks of `block` = (b, b) values.
    """

    def __init__(self, source: TensorSource, block: tuple[int, int]):
        self.where = source.where
        self.source = source
        self.block = block
        self.specs = {}
        for name, spec in source.specs.items():
            if name.endswith(SCALE_SUFFIX):
                continue
            scaled = spec.dtype == torch.float8_e4m3fn and name + SCALE_SUFFIX in source.specs
            self.specs[name] = TensorSpec(torch.bfloat16, spec.shape) if scaled else spec
            if scaled:
                grid = tuple(math.ceil(n / b) for n, b in zip(spec.shape, block, strict=True))
                found = source.specs[name + SCALE_SUFFIX].shape
                if found != grid:
                    raise CheckpointError(f"'{name}{SCALE_SUFFIX}' is {list(found)}; blocks of {list(block)} over "
                                          f"{list(spec.shape)} need {list(grid)}")

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        if tensor.dtype != torch.float8_e4m3fn or name + SCALE_SUFFIX not in self.source.specs:
            return tensor
        scale = self.source.read(name + SCALE_SUFFIX).float()
        out = torch.empty(tensor.shape, dtype=torch.bfloat16)
        rows, columns = self.block
        for i in range(scale.shape[0]):  # one row of blocks at a time: no fp32 copy of the whole weight
            block_rows = slice(i * rows, (i + 1) * rows)
            scale_of_columns = scale[i].repeat_interleave(columns)[: tensor.shape[1]]
            out[block_rows] = (tensor[block_rows].float() * scale_of_columns).to(torch.bfloat16)
        return out


def dequantize(source: TensorSource, quantization: Mapping[str, Any] | None) -> TensorSource:
    """The source with its weights in bf16, where `quantization_config` says that they are quantised.

    Raises:
        ConfigError: the form of quantisation is not known.
    """
    if not quantization:
        return source
    method = quantization.get("quant_method")
    block = quantization.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list | tuple) or len(block) != 2:
        got = method if method != "fp8" else f"fp8 with weight_block_size={block}"
        raise ConfigError("quantization_config", "this quantisation cannot be read", got=got,
                          expected="unquantised weights, or fp8 with two-dimensional block scales (DeepSeek-V3)",
                          hint="dequantise the checkpoint with the tool that made it")
    return DequantizedSource(source, (int(block[0]), int(block[1])))
