"""Import and export: between checkpoint folders, tensor by tensor, and between models in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridlm import checkpoint as ckpt
from hybridlm.errors import CheckpointError
from hybridlm.interop.family_registry import build_hf_config, family_of, read_config, read_raw, write_config
from hybridlm.interop.mapping import Spec, Step, match
from hybridlm.interop.reader import SafetensorsFolder, StateDict, TensorSource, dequantized
from hybridlm.model.config import ModelConfig, MTPConfig
from hybridlm.model.model import HybridLM, build_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("hybridlm")


def our_specs(config: ModelConfig) -> dict[str, Spec]:
    """Name, dtype and shape of everything a checkpoint of this model holds; nothing is allocated."""
    model = build_model(config, device="meta")
    return {name: Spec(t.dtype, tuple(t.shape)) for name, t in ckpt.unique_tensors(model).items()}


class Import:
    """A checkpoint of transformers, checked as a whole, ready to be read tensor by tensor."""

    def __init__(self, raw: Mapping[str, Any], source: TensorSource, *, mtp: bool = True):
        self.family, text = family_of(raw, source.where)
        self.source = dequantized(source, raw.get("quantization_config") or text.get("quantization_config"))
        specs, self.spelling = self.family.spell(self.source.specs)
        keys = frozenset(specs) if mtp else frozenset()
        self.config = read_config(self.family, text, keys)
        ours = our_specs(self.config)
        ignored = self.family.is_ignored(self.config)
        if not mtp:
            ignored = _or(ignored, partial(_is_mtp, self.config))
        self.steps = match(self.family.rules(self.config), specs, ours, source.where, self.spelling, ignored)
        _check_complete(self.steps, ours)

    def specs(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Spec]]:
        """Our tensors in order, in `dtype` or in the dtype of the source."""
        shapes = our_specs(self.config)
        for step in self.steps:
            theirs = self.source.specs[step.source[0]].dtype
            for name in step.ours:
                yield name, Spec(dtype or theirs, shapes[name].shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Our tensors, one group in memory at a time."""
        for step in self.steps:
            reads = [partial(self.source.read, name) for name in step.source]
            try:
                ours = step.layout.op.to_ours(reads)
            except CheckpointError as error:
                raise CheckpointError(f"{', '.join(step.source[:3])}: {error}") from None
            yield from zip(step.ours, ours, strict=True)


    def model(self, dtype: torch.dtype) -> HybridLM:
        """The whole model in memory, in evaluation mode."""
        model = build_model(self.config).to(dtype)
        ours = ckpt.unique_tensors(model)
        with torch.no_grad():
            for name, tensor in self.tensors():
                ours[name].copy_(tensor)
        return model.eval()


def _or(*tests: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda name: any(test(name) for test in tests)


def _is_mtp(config: ModelConfig, name: str) -> bool:
    if name.startswith("mtp."):
        return True
    part = name.removeprefix("model.layers.").partition(".")[0]
    return part.isdecimal() and name.startswith("model.layers.") and int(part) >= config.num_layers


def _check_complete(steps: list[Step], ours: Mapping[str, Spec]) -> None:
    covered = {name for step in steps for name in step.ours}
    if covered != set(ours):
        odd = sorted(covered ^ set(ours))
        raise RuntimeError(f"the key mapping does not cover the model: {odd[:4]}")


class Export:
    """A model of ours in the format of a family (or as `hybridlm`, which holds any), ready to be read tensor by tensor.

    `family` null takes the first format that says exactly what the model computes.
    """

    def __init__(self, config: ModelConfig, source: TensorSource, *, family: str | None = None, mtp: bool = True):
        if not mtp and config.mtp.depth:
            config = replace(config, mtp=MTPConfig())
        self.config, self.source = config, source
        self.family, self.raw = write_config(config, family)
        self.rules, self.derived = self.family.rules(config), list(self.family.derived(config))
        missing = sorted(name for r in self.rules for name in r.ours if name not in source.specs)
        if missing:
            raise CheckpointError(f"{source.where} lacks '{missing[0]}'"
                                  + (f" and {len(missing) - 1} more tensors" if missing[1:] else ""))

    def specs(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Spec]]:
        """Their tensors in order, in `dtype` or in the dtype of the source; what must stay fp32 does."""
        keep = build_model(self.config, device="meta").fp32_parameter_names() if dtype else set()
        for r in self.rules:
            for name, spec in r.theirs(self.source.specs, r.layouts[0]):
                yield name, spec if dtype is None or r.ours[0] in keep else Spec(dtype, spec.shape)
        for name, shape, _ in self.derived:
            yield name, Spec(torch.float32, shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Their tensors, one group of ours in memory at a time."""
        for r in self.rules:
            layout = r.layouts[0]
            reads = [partial(self.source.read, name) for name in r.ours]
            yield from zip(layout.names, layout.op.to_theirs(reads), strict=True)
        for name, _, make in self.derived:
            yield name, make()


def to_hf_config(config: ModelConfig, family: str | None = None) -> PreTrainedConfig:
    """The transformers config object of a model.

    Raises:
        ConfigError: no family of transformers computes this model, or not the one asked for.
    """
    found, raw = write_config(config, family)
    return build_hf_config(found, raw)


def import_hf(source: str | os.PathLike[str] | PreTrainedModel, *, mtp: bool = True,
              dtype: torch.dtype = torch.float32, device: str = "cpu") -> HybridLM:
    """Our model with the weights of a checkpoint folder of transformers, or of one of its models, in evaluation mode.

    `mtp=False` leaves multi-token prediction weights out.

    Raises:
        CheckpointError: an unknown architecture, or tensors that do not fit it.
        ConfigError: the config asks for what we do not have.
    """
    if isinstance(source, str | os.PathLike):
        plan = Import(read_raw(Path(source)), SafetensorsFolder(Path(source)), mtp=mtp)
    else:
        plan = Import(source.config.to_dict(), StateDict(source.state_dict(), f"the {type(source).__name__}"), mtp=mtp)
    return plan.model(dtype).to(device)


def to_hf_model(model: HybridLM, family: str | None = None) -> PreTrainedModel:
    """A transformers model with a copy of our weights, in evaluation mode. MTP weights stay behind.

    Raises:
        ConfigError: no family of transformers computes this model, or not the one asked for.
    """
    from transformers import AutoModelForCausalLM

    export = Export(model.config, StateDict(ckpt.unique_tensors(model)), family=family, mtp=False)
    config = build_hf_config(export.family, export.raw)
    cls: Any = AutoModelForCausalLM._model_mapping[type(config)]
    tensors = {name: tensor.clone() for name, tensor in export.tensors()}
    hf, info = cls.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    _check_loaded(info, type(hf).__name__)
    return hf.eval()


def _check_loaded(info: Mapping[str, Any], what: str) -> None:
    odd = {key: sorted(info[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if odd:
        raise CheckpointError(f"{what} did not take the exported weights: {odd}")
