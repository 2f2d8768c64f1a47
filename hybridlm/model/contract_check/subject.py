"""The mixer or feed-forward that the checks are run on.

B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.model.config import ModelConfig, ScheduleConfig
from hybridlm.model.decode_step import DecodeStep
from hybridlm.model.feed_forward import FEED_FORWARDS, build_feed_forward
from hybridlm.model.feed_forward.contract import FeedForwardConfig
from hybridlm.model.fp32_parameters import is_listed
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers import MIXERS, build_mixer
from hybridlm.model.mixers.contract import Aux, MixerConfig
from hybridlm.model.residual import BranchConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import LAYER_INPUT, SharedRead
from hybridlm_kernels.packing import CuSeqlens

CPU = torch.device("cpu")
TOKEN_BITS = 6  # signs of inputs that make the id of a token


@dataclass(frozen=True, eq=False)
class Subject:
    """A mixer or feed-forward with the layer around it, and the earlier layers that it reads from.

    >>> from hybridlm.model.mixers import DeltaRuleConfig
    >>> config = DeltaRuleConfig(num_heads=2, head_dim=8)
    >>> subject = Subject(config, small_context(config))
    >>> module = subject.build()
    >>> subject.run(module, subject.inputs(1, 5))[0].shape
    torch.Size([1, 5, 24])
    """

    config: MixerConfig | FeedForwardConfig
    context: LayerContext

    @property
    def is_mixer(self) -> bool:
        """True for a mixer, False for a feed-forward."""
        return isinstance(self.config, MixerConfig)

    def new_module(self) -> nn.Module:
        """Build the module without initialising it."""
        if isinstance(self.config, MixerConfig):
            return build_mixer(self.config, self.context)
        return build_feed_forward(self.config, self.context)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """Build the module, and move every parameter off its initial value, which may be neutral (a gate of zero)."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            module = self.new_module()
            module.init_weights(0.3)  # type: ignore[operator]
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return module.to(dtype)

    def inputs(self, batch: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        """Normal random inputs [B, T, D]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.context.hidden_size, dtype=dtype, generator=generator)

    def run(self, module: Any, x_BTD: Tensor, cu_seqlens: CuSeqlens | None = None, state: Any = None,
            offset: int = 0) -> tuple[Tensor, Aux]:
        """Run the module on rows.

        Args:
            module: from `build`.
            x_BTD: inputs [B, T, D].
            cu_seqlens: borders of packed documents; None: each row is one.
            state: from `new_state`, updated in place; None in training.
            offset: tokens that are in the state already.

        Returns:
            Outputs [B, T, D] and aux.
        """
        seq = SequenceInfo.make(x_BTD.shape[0], x_BTD.shape[1], x_BTD.device, cu_seqlens, offset)
        return self.run_on(module, x_BTD, seq, state)

    def run_on(self, module: Any, x_BTD: Tensor, seq: SequenceInfo, state: Any = None) -> tuple[Tensor, Aux]:
        """Outputs [B, T, D] and aux for a sequence that is made already; see `run`."""
        self.run_sources(x_BTD, seq, state)
        return module(x_BTD, seq, state.own if isinstance(state, StateWithSources) else state)

    def step(self, step: DecodeStep, x_B1D: Tensor, state: Any, offset: int) -> Tensor:
        """Output [B, 1, D] of a prepared step for the token behind `offset` others; see `run`."""
        seq = SequenceInfo.make(len(x_B1D), 1, x_B1D.device, offset=offset)
        self.run_sources(x_B1D, seq, state)
        return step(x_B1D, seq, state.own if isinstance(state, StateWithSources) else state)

    def new_state(self, module: Any, batch: int, max_length: int) -> Any:
        """Make the module's empty decode state, with those of the layers it reads from; None where none is kept."""
        own = module.new_state(batch, max_length)
        sources = {index: source.new_state(self._source_module(index, torch.float32), batch, max_length)
                   for index, source in self.sources.items()}
        return StateWithSources(own, sources) if sources else own

    @property
    def reads(self) -> Sequence[SharedRead]:
        """The values of earlier layers that the mixer reads."""
        return self.config.reads(self.context) if isinstance(self.config, MixerConfig) else ()

    @cached_property
    def sources(self) -> dict[int, Subject]:
        """The layers that the mixer reads from, by their index."""
        indices = sorted({self.context.source_of(read) for read in self.reads})
        return {index: Subject(self.context.mixers[self.context.layers[index]],  # type: ignore[arg-type]
                               replace(self.context, layer_index=index)) for index in indices}

    def run_sources(self, x_BTD: Tensor, seq: SequenceInfo, state: Any = None) -> None:
        """Run the layers that the mixer reads from on the same inputs, so that they leave their values.

        Tokens get ids that follow from their inputs, for a module that looks them up, and their inputs as embedding.
        """
        if seq.embedding_BTD is None:
            seq.embedding_BTD = x_BTD
        if seq.token_ids_BT is None:
            bits_BTN = (x_BTD.detach()[..., :TOKEN_BITS] > 0).long()
            seq.token_ids_BT = (bits_BTN << torch.arange(TOKEN_BITS)).sum(-1)
        for index, source in self.sources.items():
            source_state = state.sources[index] if isinstance(state, StateWithSources) else None
            seq.leave(LAYER_INPUT, index, x_BTD)
            source.run_on(self._source_module(index, x_BTD.dtype), x_BTD, seq, source_state)

    def _source_module(self, index: int, dtype: torch.dtype) -> Any:
        """Layer `index`, with weights that get no gradient, because this layer is not checked."""
        key = index, dtype
        if key not in self._source_modules:
            half = dtype == torch.bfloat16
            with torch.inference_mode(False):  # it serves training after the check that starts with inference
                module = self.sources[index].build(torch.float32 if half else dtype).requires_grad_(False)
            self._source_modules[key] = round_weights(module) if half else module
        return self._source_modules[key]

    @cached_property
    def _source_modules(self) -> dict[tuple[int, torch.dtype], Any]:
        return {}


@dataclass
class StateWithSources:
    """The decode state of a mixer, and those of the layers it reads from."""

    own: Any
    sources: dict[int, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the mixer's own state."""
        return 0 if self.own is None else self.own.num_bytes


def round_weights(module: Any) -> Any:
    """The module with its weights in bf16, but those of `fp32_parameters`."""
    return module.bfloat16()


def is_kept_in_fp32(module: Any, name: str) -> bool:
    """Whether `fp32_parameters` holds the parameter, by its name or the last parts of it."""
    return is_listed(name, module.fp32_parameters)


def small_context(config: MixerConfig | FeedForwardConfig, hidden_size: int = 24, layer_index: int = 1,
                  zero_centered: bool = False, source: MixerConfig | None = None) -> LayerContext:
    """The context of one of four layers, all of which have this mixer or this feed-forward.

    With `source`, the first layer has that mixer, for a mixer that reads from another layer.
    """
    if isinstance(config, MixerConfig):
        mixer = replace(config, residual=BranchConfig())  # how it joins a stream is no part of the mixer
        feed_forward = FEED_FORWARDS.config_class("dense")(intermediate_size=2 * hidden_size)
    else:
        mixer = MIXERS.config_class("attention")(num_heads=2, head_dim=8)
        feed_forward = replace(config, residual=None)
    schedule = ScheduleConfig(pattern=["mixer"], override={} if source is None else {0: "source"})
    model = ModelConfig(vocab_size=2**TOKEN_BITS, hidden_size=hidden_size, num_layers=4, max_position=256,
                        schedule=schedule, mixers={"mixer": mixer, **({} if source is None else {"source": source})},
                        feed_forward=feed_forward, norm=NormConfig(eps=1e-5, zero_centered=zero_centered))
    return model.layer_context(layer_index)
