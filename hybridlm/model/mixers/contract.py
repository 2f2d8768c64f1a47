"""The contract of a sequence mixer and the registry of their kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from hybridlm.errors import ConfigError
from hybridlm.kind_registry import KindRegistry
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind, SharedRead

# Of one layer: named losses ("loss/..."), and statistics that are reported over all layers ("stat/...") or also for
# each ("layer/...").
Aux = dict[str, Tensor]


@dataclass(kw_only=True)
class MixerConfig:
    """Base of every mixer's config. Subclasses register a `kind` with `@register_mixer`.

    Costs are known from the config alone. FLOPs count a multiply-add as 2, forward only.
    """

    kind: str
    residual: BranchConfig = field(default_factory=BranchConfig)
    is_linear: ClassVar[bool] = False  # fixed-size decode state: no term that grows with context

    def num_params(self, context: LayerContext) -> int:
        """Parameters of the mixer, without the branch's own norm."""
        raise TypeError(f"{type(self).__name__} does not count its parameters")

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Forward FLOPs a token by part, averaged over a causal sequence of `context_length` tokens."""
        raise TypeError(f"{type(self).__name__} does not count its FLOPs")

    def loss_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        """FLOPs a token of a loss that the mixer computes for itself in training, its whole backward included."""
        return 0.0

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of decode state for one sequence after `context_length` tokens."""
        raise TypeError(f"{type(self).__name__} does not count its state")

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        """Kinds of values that the layer can leave for later layers; see `hybridlm.model.sharing`."""
        return ()

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        """Values of earlier layers that the layer reads."""
        return ()

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Raise ConfigError unless the mixer can work on rows that are split into `shards` of `length` tokens (see
        `hybridlm.model.context_parallel`)."""
        raise ConfigError("kind", "cannot work on split rows", got=self.kind, expected="engine.context_parallel=1")

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """What a training step exchanges where `rows` rows are split into `shards` of `length` tokens."""
        raise TypeError(f"{type(self).__name__} does not count what shards exchange")


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

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of every parameter of the mixer, by its name within the mixer.

        Raises:
            TypeError: a parameter that is neither a linear map nor a vector, and that the kind does not declare.
        """
        return find_roles(self, head_rows=self.head_rows())

    def head_rows(self) -> dict[str, int]:
        """Linear maps of the mixer whose rows are one block per head, with their number of heads."""
        return {}


MIXERS = KindRegistry("mixer", MixerConfig)


def register_mixer(kind: str, config: type[MixerConfig]):
    """Class decorator: `kind` in a config builds this mixer. Only registered kinds can be built from a config."""

    def add(cls: type[SequenceMixer]) -> type[SequenceMixer]:
        MIXERS.register(kind, config, cls)
        return cls

    return add


def build_mixer(config: MixerConfig, context: LayerContext) -> SequenceMixer:
    return MIXERS[config.kind][1](config, context)  # type: ignore[call-arg]
