"""The context of a layer (width, index, the mixers of other layers), and types in which kinds state their costs.

All mixers and feed-forwards import this file; it imports none of them, and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from hybridlm.errors import ConfigError, require
from hybridlm.model.sharing import SharedKind, SharedRead


@dataclass(kw_only=True)
class NormConfig:
    """RMSNorm. `zero_centered` is the Gemma form: x_hat * (1 + weight), weight initialised at 0."""

    eps: float = 1e-6
    zero_centered: bool = False

    def __post_init__(self) -> None:
        require(self.eps > 0, "eps", "must be positive", got=self.eps)

    def eps_or(self, own: float | None) -> float:
        """The epsilon of a norm: `own`, an option of its mixer, or that of the model where the option is null."""
        return self.eps if own is None else own


class SharingMixer(Protocol):
    """Methods of a mixer's config that other layers may call."""

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]: ...

    def reads(self, context: LayerContext) -> Sequence[SharedRead]: ...

    def shared_width(self, kind: SharedKind, context: LayerContext) -> int: ...

    def shared_layout(self, kind: SharedKind, context: LayerContext) -> Any: ...


@dataclass(kw_only=True)
class LayerContext:
    """Facts about the model that the mixer and the feed-forward of one layer may use. Not user configuration.

    `layers` are the mixer names of all layers, `mixers` the configs by name; both are empty for a layer without a
    model around it. The block of multi-token prediction, whose mixer is `mtp_mixer` (None without one), has the index
    of the last layer and reads from the layers before that one. `vocab_size` is 0 for a layer without a model.
    `mixer_input` is the width of the mixer's input where that is not the model's width.
    """

    hidden_size: int
    layer_index: int
    num_layers: int
    norm: NormConfig
    max_position: int
    layers: Sequence[str] = ()
    mixers: Mapping[str, SharingMixer] = field(default_factory=dict)
    mtp_mixer: str | None = None
    vocab_size: int = 0
    mixer_input: int | None = None

    @property
    def mixer_width(self) -> int:
        """Width of the mixer's input; its output has that of the model."""
        return self.mixer_input or self.hidden_size

    def source_of(self, read: SharedRead) -> int:
        """Find the layer that this one reads from.

        Args:
            read: the kind of value, and the layer that is asked for, if any.

        Returns:
            The index of the layer.

        Raises:
            ConfigError: no earlier layer leaves such a value, or not the layer that is asked for.
        """
        earlier = range(min(self.layer_index, len(self.layers)))
        if isinstance(read.layer, int):
            candidates: Sequence[int] = [read.layer] if read.layer in earlier else []
        else:
            candidates = [index for index in earlier[::-1] if read.layer in (None, self.layers[index])]
        for index in candidates:
            if self._leaves(index, read.kind):
                return index
        wanted = f"layer {read.layer}" if isinstance(read.layer, int) else "earlier layer"
        wanted += f" with mixer {read.layer!r}" if isinstance(read.layer, str) else ""
        sources = [f"{index} ({self.layers[index]})" for index in earlier if self._leaves(index, read.kind)]
        raise ConfigError(read.option, f"layer {self.layer_index} reads {read.kind.name}, which no {wanted} leaves",
                          expected=f"an earlier layer that leaves it: {', '.join(sources) or 'none does'}")

    def _leaves(self, index: int, kind: SharedKind) -> bool:
        """Whether layer `index` leaves values of the kind."""
        return kind.every_layer or kind in self._mixer(index).leaves(replace(self, layer_index=index))

    def shared_width(self, read: SharedRead) -> int:
        """Find how many numbers per token the value has that this layer reads.

        Args:
            read: the kind of value, and the layer that is asked for, if any.

        Raises:
            ConfigError: no earlier layer leaves such a value.
        """
        index = self.source_of(read)
        return self._mixer(index).shared_width(read.kind, replace(self, layer_index=index))

    def shared_layout(self, read: SharedRead) -> Any:
        """Find what the layer that this one reads from says of the value, such as its heads.

        Args:
            read: the kind of value, and the layer that is asked for, if any.

        Returns:
            An object of the type that the kind of value defines.

        Raises:
            ConfigError: no earlier layer leaves such a value.
        """
        index = self.source_of(read)
        return self._mixer(index).shared_layout(read.kind, replace(self, layer_index=index))

    def is_read(self, kind: SharedKind) -> bool:
        """Whether a later layer, or the block of multi-token prediction, reads what this layer leaves of the kind."""
        for context, mixer in self._later():
            if any(read.kind == kind and context.source_of(read) == self.layer_index for read in mixer.reads(context)):
                return True
        return False

    def is_first_reader(self, read: SharedRead) -> bool:
        """Whether no layer between this one and the source of a value reads the same value."""
        source = self.source_of(read)
        between = (replace(self, layer_index=index) for index in range(source + 1, self.layer_index))
        return not any(other.kind == read.kind and context.source_of(other) == source
                       for context in between for other in self._mixer(context.layer_index).reads(context))

    def _later(self) -> Iterator[tuple[LayerContext, SharingMixer]]:
        for index in range(self.layer_index + 1, len(self.layers)):
            yield replace(self, layer_index=index), self._mixer(index)
        if self.mtp_mixer is not None:
            yield replace(self, layer_index=self.num_layers - 1), self.mixers[self.mtp_mixer]

    def _mixer(self, index: int) -> SharingMixer:
        return self.mixers[self.layers[index]]


@dataclass(frozen=True)
class ShardTraffic:
    """Bytes that one process sends in one kind of exchange between shards of rows (`hybridlm.model.context_parallel`).

    For `exchange` these are the bytes of all shards together; for the backward of `gather` they are the bytes of the
    process's own shard.
    """

    kind: Literal["gather", "exchange", "from_previous"]
    forward: int
    backward: int
