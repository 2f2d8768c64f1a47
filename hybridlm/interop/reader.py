"""Reading tensors one at a time: from safetensors files, or from a state dict. fp8 weights in DeepSeek's block-scale
form are dequantised as they are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.interop.mapping import Spec
from hybridlm.tensor_storage import StoredTensor, stored_tensors

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


class SafetensorsFolder:
    """All tensors of a checkpoint's safetensors files; `stored`: the same by other names."""

    def __init__(self, folder: Path, stored: Mapping[str, StoredTensor] | None = None):
        self.where = str(folder)
        self._stored = stored_tensors(folder) if stored is None else stored
        self.specs: Mapping[str, Spec] = {name: Spec(s.dtype, tuple(s.shape)) for name, s in self._stored.items()}

    def read(self, name: str) -> Tensor:
        return self._stored[name].read()


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
