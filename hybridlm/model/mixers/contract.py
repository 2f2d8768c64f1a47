"""The contract of a sequence mixer and the registry of their kinds."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from hybridlm.model.config import LayerContext, MixerConfig
from hybridlm.model.sequence import SequenceInfo

# Of one layer: named losses ("loss/..."), and statistics that are reported over all layers ("stat/...") or also for
# each ("layer/...").
Aux = dict[str, Tensor]


class SequenceMixer(nn.Module):
    """Mixes information along the sequence: x_BTD -> x_BTD.

    `fp32_parameters` are names of parameters, or their last parts, that no engine may cast down.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ()

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: Any | None = None) -> tuple[Tensor, Aux]:
        """`state` is this layer's decode state from `new_state`, updated in place; None when training."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def new_state(self, batch: int, max_length: int) -> Any:
        """Empty decode state for `batch` sequences of at most `max_length` tokens."""
        raise TypeError(f"{type(self).__name__} cannot decode")

    def init_weights(self, std: float) -> None:
        """Published initialisation of everything in the mixer; `std` for plain projections."""
        raise TypeError(f"{type(self).__name__} has no initialisation")


MIXERS: dict[str, tuple[type[MixerConfig], type[SequenceMixer]]] = {}


def register_mixer(kind: str, config: type[MixerConfig]):
    """Class decorator: `kind` in a config builds this mixer. Only registered kinds can be built from a config."""

    def add(cls: type[SequenceMixer]) -> type[SequenceMixer]:
        MIXERS[kind] = (config, cls)
        return cls

    return add


def build_mixer(config: MixerConfig, context: LayerContext) -> SequenceMixer:
    return MIXERS[config.kind][1](config, context)  # type: ignore[call-arg]
