"""Gated memory unit: a layer that reads the memory of an earlier recurrent layer, gated by its own input.

    y = W_out (m * silu(W_in x)),   m: the output of the earlier layer's recurrence before its gate

It needs no state of its own. Source: Ren et al. 2025 (SambaY, Decoder-Hybrid-Decoder), section 2.2; Phi-4-mini-flash.

B rows, T tokens, D hidden size, I channels of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.decode_state import NoState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.memory import MEMORY
from hybridlm.model.mixers.contract import Aux, MixerConfig, SequenceMixer, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import RMSNorm
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedRead


@dataclass(kw_only=True)
class GatedMemoryConfig(MixerConfig):
    """Configuration of a gated memory unit.

    Args:
        source: layer whose memory is read: its index, or the name of a mixer, whose nearest earlier layer is read; null
            is the nearest earlier layer that leaves one.
        norm: whether the gated memory is normalised (RMSNorm over all channels), as for memories of Mamba-2 or
            Gated DeltaNet.
        norm_eps: of that norm; null takes the model's.
    """

    kind: str = "gated_memory"
    source: int | str | None = None
    norm: bool = False
    norm_eps: float | None = None
    is_linear: ClassVar[bool] = True

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        return (SharedRead(MEMORY, self.source, "source"),)

    def channels(self, context: LayerContext) -> int:
        """Channels I of the memory that is read.

        Raises:
            ConfigError: no earlier layer leaves a memory.
        """
        return context.shared_width(self.reads(context)[0])

    def num_params(self, context: LayerContext) -> int:
        return self.channels(context) * (2 * context.hidden_size + self.norm)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        return {"projections": 4.0 * context.hidden_size * self.channels(context)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Nothing: the layer that leaves the memory keeps the state."""
        return 0

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the input, the gate around its activation, and the product."""
        return element_bytes * (context.hidden_size + (3 + self.norm) * self.channels(context))

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: each token reads the memory of itself."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return []

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        return data if self.norm else {key: value for key, value in data.items() if key != "norm_eps"}

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        return {}  # the width is that of the memory


@register_mixer("gated_memory", GatedMemoryConfig)
class GatedMemory(SequenceMixer):
    """Parameters: in_proj [I, D], out_proj [D, I], and o_norm [I] by option."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("o_norm.weight",)
    config: GatedMemoryConfig

    def __init__(self, config: GatedMemoryConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.source = context.source_of(config.reads(context)[0])
        channels = config.channels(context)
        self.in_proj = nn.Linear(context.hidden_size, channels, bias=False)
        self.o_norm = RMSNorm(channels, context.norm.eps_or(config.norm_eps)) if (
            config.norm) else None
        self.out_proj = nn.Linear(channels, context.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: NoState | None = None) -> tuple[Tensor, Aux]:
        memory_BTI = seq.read(MEMORY, self.source)
        gated_BTI = memory_BTI.to(x_BTD.dtype) * F.silu(self.in_proj(x_BTD))
        return self.out_proj(gated_BTI if self.o_norm is None else self.o_norm(gated_BTI)), {}

    @property
    def decodes_padded_rows(self) -> bool:
        return True

    def new_state(self, batch: int, max_length: int) -> NoState:
        return NoState()

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
