"""Lower bounds of forget gates that grow with depth: one parameter for all layers of a kind (HGRN, HGRN-2).

The first of these layers owns the parameter, has no bound itself, and leaves all bounds for the others. A layer without
a model around it owns what it needs.

L layers of the kind, C channels.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind, SharedRead


@dataclass(kw_only=True)
class BoundedConfig(MixerConfig):
    """Base of configs whose forget gates have lower bounds that grow with depth.

    Args:
        lower_bound: whether the gates have bounds.
    """

    lower_bound: bool = True

    @abc.abstractmethod
    def gate_channels(self, context: LayerContext) -> int:
        """Channels C of the forget gate."""

    def bounded_layers(self, context: LayerContext) -> list[int]:
        """Indices of the layers of the model that share bounds with this one; all where it stands in none of them."""
        found = [index for index, name in enumerate(context.layers) if self._shares_with(context.mixers[name], context)]
        return found if context.layer_index in found else list(range(context.num_layers))

    def _shares_with(self, other: object, context: LayerContext) -> bool:
        return isinstance(other, BoundedConfig) and other.kind == self.kind and other.lower_bound and (
            other.gate_channels(context) == self.gate_channels(context))

    def is_shared(self, context: LayerContext) -> bool:
        """Whether the layer is one of a model's; one without a model, or inside another mixer, has its own bounds."""
        return context.layer_index < len(context.layers) and self._shares_with(
            context.mixers[context.layers[context.layer_index]], context)

    def bounds_owned(self, context: LayerContext) -> int:
        """Rows L of the parameter of this layer; 0 where it has none."""
        layers = self.bounded_layers(context)
        needed = self.lower_bound and (len(layers) > 1 if self.is_shared(context) else context.layer_index > 0)
        owns = not self.is_shared(context) or context.layer_index == layers[0]
        return len(layers) if needed and owns else 0

    def _kind_of_bounds(self, context: LayerContext) -> SharedKind:
        return SharedKind(f"the lower bounds of {self.kind} over {self.gate_channels(context)} channels", gradient=True)

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        shared = self.bounds_owned(context) > 0 and self.is_shared(context)
        return (self._kind_of_bounds(context),) if shared else ()

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        if not self.lower_bound or not self.is_shared(context):
            return ()
        first = self.bounded_layers(context)[0]
        return () if context.layer_index == first else (
            SharedRead(self._kind_of_bounds(context), first, "lower_bound"),)


class BoundedMixer(TensorStateMixer):
    """Base of mixers whose forget gates have lower bounds; parameter: lower_bounds [L, C] in the layer that owns it."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("lower_bounds",)

    def __init__(self, config: BoundedConfig, context: LayerContext):
        super().__init__()
        layers = config.bounded_layers(context)
        self.bound_index = layers.index(context.layer_index)
        self.layer_index = context.layer_index
        self.bound_kind = config._kind_of_bounds(context)
        reads = config.reads(context)
        self.bound_source = context.source_of(reads[0]) if reads else None
        self.bound_is_read = bool(config.leaves(context)) and context.is_read(self.bound_kind)
        rows = config.bounds_owned(context)
        self.lower_bounds = nn.Parameter(torch.zeros(rows, config.gate_channels(context))) if rows else None

    def read_lower_bound(self, seq: SequenceInfo) -> Tensor | None:
        """The lower bound [C] of this layer's gate in fp32; None for the first layer. The owner leaves all of them."""
        bounds_LC = None if self.lower_bounds is None else cumulative_bounds(self.lower_bounds)
        if bounds_LC is not None and self.bound_is_read:
            seq.leave(self.bound_kind, self.layer_index, bounds_LC)
        if self.bound_source is not None:
            bounds_LC = seq.read(self.bound_kind, self.bound_source)
        return None if bounds_LC is None or self.bound_index == 0 else bounds_LC[self.bound_index]


def cumulative_bounds(parameter_LC: Tensor) -> Tensor:
    """The bounds [L, C] of all layers: sums of a softmax over layers, from 0 in the first on (Qin et al. 2023, eq. 5).

    >>> cumulative_bounds(torch.zeros(4, 1)).flatten().tolist()
    [0.0, 0.25, 0.5, 0.75]
    """
    share_LC = parameter_LC.softmax(0)
    return share_LC.cumsum(0) - share_LC[0]
