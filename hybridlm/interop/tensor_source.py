"""Reads tensors one at a time, from safetensors files or from a state dict.

fp8 weights are dequantised when they are read: with the block scales of DeepSeek, also those of stacked experts, or
with one scale per tensor.
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
ACTIVATION_SUFFIXES = ("activation_scale", "input_scale")  # for activations in fp8, which there are none of here


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
    """Reads fp8 weights with scales beside them as bf16.

    A value is w[..., i, j] * scale[..., i // b, j // c] with blocks of `block` = (b, c) values, the format of
    DeepSeek-V3. Stacked experts [E, rows, columns] have scales [E, ...]. A scale of one number is of the whole tensor.

    Args:
        source: the tensors as they are stored.
        block: rows and columns of a block; None: every scale must be one number.

    Raises:
        CheckpointError: a scale whose shape does not fit its weight, or a weight without a scale.
    """

    def __init__(self, source: TensorSource, block: tuple[int, int] | None):
        self.where = source.where
        self.source = source
        self.block = block
        self.specs = {}
        for name, spec in source.specs.items():
            if name.endswith((SCALE_SUFFIX, *ACTIVATION_SUFFIXES)):
                continue
            self.specs[name] = spec
            if spec.dtype != torch.float8_e4m3fn:
                continue
            scale = source.specs.get(name + SCALE_SUFFIX)
            if scale is None:
                other = next((n for n in source.specs if n.startswith(name + "_")), None)
                raise CheckpointError(f"'{name}' is in fp8 without '{name}{SCALE_SUFFIX}' beside it"
                                      + (f" ('{other}' is there, in a form that is not known)" if other else "")
                                      + ": convert the checkpoint to bf16 with the tool that made it")
            self._check_scale(name, spec.shape, scale.shape)
            self.specs[name] = TensorSpec(torch.bfloat16, spec.shape)

    def _check_scale(self, name: str, shape: tuple[int, ...], found: tuple[int, ...]) -> None:
        if math.prod(found) == 1:
            return
        if self.block is None or len(shape) not in (2, 3):
            raise CheckpointError(f"'{name}{SCALE_SUFFIX}' is {list(found)}; expected one number"
                                  + ("" if self.block else ", because the config names no weight_block_size"))
        grid = (*shape[:-2], *(math.ceil(n / b) for n, b in zip(shape[-2:], self.block, strict=True)))
        if found != grid:
            raise CheckpointError(f"'{name}{SCALE_SUFFIX}' is {list(found)}; blocks of {list(self.block)} over "
                                  f"{list(shape)} need {list(grid)}")

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        scale = self.source.read(name + SCALE_SUFFIX).float()
        out = torch.empty(tensor.shape, dtype=torch.bfloat16)
        matrices = tensor.reshape(-1, *tensor.shape[-2:])  # [1 or E, rows, columns]
        scales = scale.reshape(1, 1, 1).expand(len(matrices), 1, 1) if scale.numel() == 1 \
            else scale.reshape(len(matrices), *scale.shape[-2:])
        rows, columns = matrices.shape[1:] if scale.numel() == 1 or self.block is None else self.block
        for matrix, scale_of_blocks, result in zip(matrices, scales, out.view(matrices.shape), strict=True):
            for i in range(scale_of_blocks.shape[0]):  # one row of blocks at a time: no fp32 copy of the whole weight
                block_rows = slice(i * rows, (i + 1) * rows)
                scale_of_columns = scale_of_blocks[i].repeat_interleave(columns)[: matrix.shape[1]]
                result[block_rows] = (matrix[block_rows].float() * scale_of_columns).to(torch.bfloat16)
        return out


def dequantize(source: TensorSource, quantization: Mapping[str, Any] | None) -> TensorSource:
    """The source with its weights in bf16, where `quantization_config` says that they are quantised.

    Raises:
        ConfigError: the form of quantisation is not known.
        CheckpointError: scales that do not fit their weights.
    """
    if not quantization:
        return source
    method = quantization.get("quant_method")
    block = quantization.get("weight_block_size")
    fits = block is None or (isinstance(block, list | tuple) and len(block) == 2)
    if method != "fp8" or not fits:
        got = method if method != "fp8" else f"fp8 with weight_block_size={block}"
        raise ConfigError("quantization_config", "this quantisation cannot be read", got=got,
                          expected="unquantised weights, or fp8 with two-dimensional block scales (DeepSeek-V3) or "
                                   "one scale per tensor",
                          hint="dequantise the checkpoint with the tool that made it")
    return DequantizedSource(source, None if block is None else (int(block[0]), int(block[1])))
