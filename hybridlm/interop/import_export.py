"""Plans of import and export, checked completely before the first tensor is read; conversion of models in memory."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridlm import checkpoint as ckpt
from hybridlm.errors import CheckpointError
from hybridlm.interop.family_registry import (
    build_hf_config,
    find_family,
    read_config_json,
    read_model_config,
    write_hf_config,
)
from hybridlm.interop.hub_folder import find_checkpoint_folder
from hybridlm.interop.tensor_rules import ReadStep, TensorSpec, match_rules
from hybridlm.interop.tensor_source import SafetensorsSource, StateDictSource, TensorSource, dequantize
from hybridlm.model.config import ModelConfig, MTPConfig
from hybridlm.model.model import HybridLM, build_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("hybridlm")


def list_our_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor in a checkpoint of this model, by name; nothing is allocated."""
    model = build_model(config, device="meta")
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in ckpt.unique_tensors(model).items()}


class ImportPlan:
    """A checkpoint of transformers that was checked against its config, ready to be read tensor by tensor.

    Args:
        raw: its config.json.
        source: its tensors.
        mtp: read multi-token prediction weights.

    Raises:
        CheckpointError: an unknown architecture, or tensors that do not fit the config.
        ConfigError: the config asks for something that hybridlm does not have.
    """

    def __init__(self, raw: Mapping[str, Any], source: TensorSource, *, mtp: bool = True):
        self.family, text = find_family(raw, source.where)
        self.source = dequantize(source, raw.get("quantization_config") or text.get("quantization_config"))
        specs, self.spelling = self.family.to_official_names(self.source.specs)
        keys = frozenset(specs) if mtp else frozenset()
        self.config = self._untie_if_different(read_model_config(self.family, text, keys), specs)
        ours = list_our_tensors(self.config)
        ignored = self.family.make_ignored_test(self.config)
        if not mtp:
            ignored = _any_of(ignored, partial(_is_mtp_key, self.config))
        self.steps = match_rules(self.family.rules(self.config), specs, ours, source.where, self.spelling, ignored)
        _check_complete(self.steps, ours)

    def _untie_if_different(self, config: ModelConfig, specs: Mapping[str, TensorSpec]) -> ModelConfig:
        """Keep a head of its own where the files hold one that is not the embedding, as transformers does."""
        embedding, head = self.family.embedding_key, self.family.head_key
        if not config.tie_embeddings or head not in specs or embedding not in specs:
            return config
        first, second = (self.source.read(self.spelling[name]) for name in (embedding, head))
        if torch.equal(first, second):
            return config
        log.warning("%s: tie_word_embeddings is true, but '%s' is not the embedding; the model keeps both",
                    self.source.where, self.spelling[head])
        return replace(config, tie_embeddings=False)

    def specs(self, dtype: torch.dtype | None) -> Iterator[tuple[str, TensorSpec]]:
        """Our tensors in order, in `dtype` or in the dtype of the source; what must stay fp32 is not cast below it."""
        shapes = list_our_tensors(self.config)
        stay_fp32 = build_model(self.config, device="meta").fp32_parameter_names()
        for step in self.steps:
            theirs = self.source.specs[step.source[0]].dtype
            for name in step.ours:
                if not theirs.is_floating_point:  # a table of numbers, which stays one
                    yield name, shapes[name]
                    continue
                wanted = torch.promote_types(dtype, theirs) if dtype and name in stay_fp32 else dtype or theirs
                yield name, TensorSpec(wanted, shapes[name].shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield our tensors by name, with one group in memory at a time.

        Raises:
            CheckpointError: a tensor whose values do not fit, such as copies that differ.
        """
        for step in self.steps:
            reads = [partial(self.source.read, name) for name in step.source]
            try:
                ours = step.layout.rearrangement.to_ours(reads)
            except CheckpointError as error:
                raise CheckpointError(f"{', '.join(step.source[:3])}: {error}") from None
            yield from zip(step.ours, ours, strict=True)

    def build_model(self, dtype: torch.dtype) -> HybridLM:
        """Build the model in memory, in evaluation mode, with its weights in `dtype`, but those that stay fp32."""
        model = build_model(self.config).to(dtype)
        ours = ckpt.unique_tensors(model)
        with torch.no_grad():
            for name, tensor in self.tensors():
                ours[name].copy_(tensor)
        return model.eval()


def _any_of(*tests: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda name: any(test(name) for test in tests)


def _is_mtp_key(config: ModelConfig, name: str) -> bool:
    """Whether a key of theirs belongs to multi-token prediction."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return name.startswith("mtp.") or (layer is not None and int(layer[1]) >= config.num_layers)


def _check_complete(steps: list[ReadStep], ours: Mapping[str, TensorSpec]) -> None:
    covered = {name for step in steps for name in step.ours}
    if covered != set(ours):
        wrong = sorted(covered ^ set(ours))
        raise RuntimeError(f"the key mapping does not cover the model: {wrong[:4]}")


class ExportPlan:
    """A model of ours in the format of a family, ready to be read tensor by tensor.

    Args:
        config: the model.
        source: its tensors by our names.
        family: the model type to write; None: the first one that computes exactly this model, or else `hybridlm`.
        mtp: write multi-token prediction weights.

    Raises:
        CheckpointError: the source lacks tensors.
        ConfigError: the family cannot hold the model.
    """

    def __init__(self, config: ModelConfig, source: TensorSource, *, family: str | None = None, mtp: bool = True):
        if not mtp and config.mtp.depth:
            config = replace(config, mtp=MTPConfig())
        self.config = config
        self.source = source
        self.family, self.raw = write_hf_config(config, family)
        self.rules = self.family.rules(config)
        self.derived = list(self.family.derived_tensors(config))
        missing = sorted(name for rule in self.rules for name in rule.ours if name not in source.specs)
        if missing:
            raise CheckpointError(f"{source.where} lacks '{missing[0]}'"
                                  + (f" and {len(missing) - 1} more tensors" if missing[1:] else ""))

    def specs(self, dtype: torch.dtype | None) -> Iterator[tuple[str, TensorSpec]]:
        """Their tensors in order, in `dtype` or in the dtype of the source; what must stay fp32 does."""
        stay_fp32 = build_model(self.config, device="meta").fp32_parameter_names() if dtype else set()
        for rule in self.rules:
            whole_numbers = not self.source.specs[rule.ours[0]].dtype.is_floating_point
            new_dtype = None if rule.ours[0] in stay_fp32 or whole_numbers else dtype
            for name, spec in rule.specs_of_theirs(self.source.specs, rule.layouts[0]):
                yield name, spec if new_dtype is None else TensorSpec(new_dtype, spec.shape)
        for derived in self.derived:
            yield derived.name, TensorSpec(torch.float32, derived.shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield their tensors by name, with one group of ours in memory at a time."""
        for rule in self.rules:
            layout = rule.layouts[0]
            reads = [partial(self.source.read, name) for name in rule.ours]
            yield from zip(layout.names, layout.rearrangement.to_theirs(reads), strict=True)
        for derived in self.derived:
            yield derived.name, derived.compute()


def to_hf_config(config: ModelConfig, family: str | None = None) -> PreTrainedConfig:
    """Make the transformers config of a model.

    Args:
        config: the model.
        family: the model type; None: the first one that computes exactly this model.

    Raises:
        ConfigError: `family` does not compute this model.

    >>> from hybridlm.run_config import load_model_config
    >>> to_hf_config(load_model_config("kimi_linear_tiny")).model_type
    'kimi_linear'
    """
    found, raw = write_hf_config(config, family)
    return build_hf_config(found, raw)


def import_hf(source: str | os.PathLike[str] | PreTrainedModel, *, mtp: bool = True,
              dtype: torch.dtype = torch.float32, device: str = "cpu") -> HybridLM:
    """Load a checkpoint or model of transformers as one of ours, in evaluation mode.

    Args:
        source: a checkpoint folder, owner/name on the Hugging Face hub, or a model in memory.
        mtp: read multi-token prediction weights too.
        dtype: dtype of the weights.
        device: where the model goes.

    Raises:
        CheckpointError: an unknown architecture, or tensors that do not fit it.
        ConfigError: the config asks for something that hybridlm does not have.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    >>> import_hf(LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))).config.layers()
    ['full', 'full']
    """
    if isinstance(source, str | os.PathLike):
        folder = find_checkpoint_folder(source)
        plan = ImportPlan(read_config_json(folder), SafetensorsSource(folder), mtp=mtp)
    else:
        tensors = StateDictSource(source.state_dict(), f"the {type(source).__name__}")
        plan = ImportPlan(source.config.to_dict(), tensors, mtp=mtp)
    return plan.build_model(dtype).to(device)


def to_hf_model(model: HybridLM, family: str | None = None) -> PreTrainedModel:
    """Make a transformers model with a copy of our weights (without those of MTP), in evaluation mode.

    Args:
        model: the model.
        family: the model type; None: the first one that computes exactly this model.

    Raises:
        ConfigError: `family` does not compute this model.
    """
    from transformers import AutoModelForCausalLM

    export = ExportPlan(model.config, StateDictSource(ckpt.unique_tensors(model)), family=family, mtp=False)
    config = build_hf_config(export.family, export.raw)
    cls: Any = AutoModelForCausalLM._model_mapping[type(config)]
    tensors = {name: tensor.clone() for name, tensor in export.tensors()}
    hf, info = cls.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    _check_loaded(info, type(hf).__name__)
    return hf.eval()


def _check_loaded(info: Mapping[str, Any], what: str) -> None:
    problems = ("missing_keys", "unexpected_keys", "mismatched_keys")
    unloaded = {key: sorted(info[key])[:3] for key in problems if info[key]}
    if unloaded:
        raise CheckpointError(f"{what} did not take the exported weights: {unloaded}")
