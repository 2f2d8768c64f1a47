"""No mixer: a layer that names it is its feed-forward alone, as in Nemotron-H.

Source: NVIDIA 2025 (Nemotron-H), section 2.1: every layer is a mixer or a feed-forward.
B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridlm.model.decode_state import NoState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.contract import Aux, MixerConfig, SequenceMixer, register_mixer
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class NoMixerConfig(MixerConfig):
    """Configuration of no mixer, which has no options."""

    kind: str = "none"
    is_branch: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True

    def num_params(self, context: LayerContext) -> int:
        return 0

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        return {}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        return 0

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        return 0.0

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: nothing is done with them."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return []

    def transfer_gaps(self) -> list[str]:
        return []


@register_mixer("none", NoMixerConfig)
class NoMixer(SequenceMixer):
    """A module without parameters, which the layer does not call."""

    def __init__(self, config: NoMixerConfig, context: LayerContext):
        super().__init__()

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: NoState | None = None) -> tuple[Tensor, Aux]:
        """Zeros, which would change no residual stream."""
        return torch.zeros_like(x_BTD), {}

    def new_state(self, batch: int, max_length: int) -> NoState:
        return NoState()

    @property
    def decodes_padded_rows(self) -> bool:
        return True

    def init_weights(self, std: float) -> None:
        """There is nothing to initialise."""
