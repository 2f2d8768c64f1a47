"""The mixer or feed-forward that is checked.

B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.model.config import ModelConfig, ScheduleConfig
from hybridlm.model.feed_forward import FEED_FORWARDS, build_feed_forward
from hybridlm.model.feed_forward.contract import FeedForwardConfig
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers import MIXERS, build_mixer
from hybridlm.model.mixers.contract import Aux, MixerConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.packing import CuSeqlens

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """A mixer or feed-forward with the layer around it.

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
        """The module as its kind builds it, before any initialisation."""
        if isinstance(self.config, MixerConfig):
            return build_mixer(self.config, self.context)
        return build_feed_forward(self.config, self.context)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """The module with every parameter away from its first value, which may be neutral (a gate of zero)."""
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
        """Outputs [B, T, D] and aux. `offset` tokens are in the decode state already."""
        seq = SequenceInfo.make(x_BTD.shape[0], x_BTD.shape[1], x_BTD.device, cu_seqlens, offset)
        return self.run_on(module, x_BTD, seq, state)

    def run_on(self, module: Any, x_BTD: Tensor, seq: SequenceInfo, state: Any = None) -> tuple[Tensor, Aux]:
        """As `run`, where the sequence is known already."""
        return module(x_BTD, seq, state)

    def new_state(self, module: Any, batch: int, max_length: int) -> Any:
        """The module's empty decode state; None for a feed-forward that keeps none."""
        return module.new_state(batch, max_length)


def small_context(config: MixerConfig | FeedForwardConfig, hidden_size: int = 24, layer_index: int = 1,
                  zero_centered: bool = False) -> LayerContext:
    """The context of one of four layers, all of which have this mixer or this feed-forward."""
    if isinstance(config, MixerConfig):
        mixer, feed_forward = config, FEED_FORWARDS.config_class("dense")(intermediate_size=2 * hidden_size)
    else:
        mixer, feed_forward = MIXERS.config_class("attention")(num_heads=2, head_dim=8), config
    model = ModelConfig(vocab_size=64, hidden_size=hidden_size, num_layers=4, max_position=256,
                        schedule=ScheduleConfig(pattern=["mixer"]), mixers={"mixer": mixer}, feed_forward=feed_forward,
                        norm=NormConfig(eps=1e-5, zero_centered=zero_centered))
    return model.layer_context(layer_index)
