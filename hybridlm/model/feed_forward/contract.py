"""The contract of a feed-forward and the registry of their kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hybridlm.errors import ConfigError
from hybridlm.kind_registry import KindRegistry
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class FeedForwardConfig:
    """Base of every feed-forward's config. `residual: null` follows the layer's mixer."""

    kind: str
    residual: BranchConfig | None = None
    keeps_state: ClassVar[bool] = False  # its output depends on earlier tokens, of which it keeps something in decoding

    def is_moe(self, layer_index: int) -> bool:
        return False

    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        """Parameters of the feed-forward in layer `context.layer_index`; `active`: those one token meets."""
        raise TypeError(f"{type(self).__name__} does not count its parameters")

    def routed_params(self, context: LayerContext) -> int:
        """Those of the parameters that belong to routed experts, which processes may divide among them."""
        return 0

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of decode state for one sequence after `context_length` tokens; 0 for a kind that `keeps_state` not."""
        if self.keeps_state:
            raise TypeError(f"{type(self).__name__} does not count its state")
        return 0

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Refuse rows that are divided into `shards` of `length` tokens (see `hybridlm.model.context_parallel`).

        Raises:
            ConfigError: the feed-forward cannot work on them; by default only one that keeps state cannot.
        """
        if self.keeps_state:
            raise ConfigError("kind", "cannot work on split rows", got=self.kind, expected="engine.context_parallel=1")

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """What a training step exchanges where `rows` rows are divided into `shards` of `length` tokens."""
        return []

    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        """Forward FLOPs a token by part."""
        raise TypeError(f"{type(self).__name__} does not count its FLOPs")


class FeedForward(nn.Module):
    """Works on each token: x [B, T, D] -> y [B, T, D].

    Most kinds look at one token alone. One that also looks at earlier tokens (a token shift) sets `keeps_state` in its
    config and keeps to the contract of a mixer: documents of `seq` never see each other, decoding with the state of
    `new_state` gives what the full forward gives, and so do rows that are divided into shards.

    A forward changes nothing in the module: what a layer must remember of a batch (expert loads) it returns in its
    aux, and the model hands it back once through `record`. So a forward may be computed again, as activation
    checkpointing does, without counting anything twice.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, config: FeedForwardConfig, context: LayerContext) -> FeedForward:
        """The module of layer `context.layer_index`; a kind whose layers differ chooses here."""
        return cls(config, context)  # type: ignore[call-arg]

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each "loss/..." in the aux; a loss not named here is only reported."""
        return {}

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: Any | None = None) -> tuple[Tensor, Aux]:
        """`state` is this layer's decode state from `new_state`, updated in place; None when training."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def new_state(self, batch: int, max_length: int) -> Any:
        """Empty decode state for `batch` sequences of at most `max_length` tokens; None for a kind without state."""
        return None

    def record(self, aux: Aux) -> None:
        """Take from the aux of one training forward what the next optimizer step needs."""

    def post_optimizer_step(self, update: bool = True) -> None:
        """After each optimizer step; `update=False` when that step was skipped."""

    def init_weights(self, std: float) -> None:
        """Fresh parameters and buffers; `std` for plain projections."""
        raise TypeError(f"{type(self).__name__} has no initialisation")

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of every parameter of the feed-forward, by its name within the feed-forward.

        Raises:
            TypeError: a parameter that is neither a linear map nor a vector, and that the kind does not declare.
        """
        return find_roles(self)


FEED_FORWARDS = KindRegistry("feed-forward", FeedForwardConfig)


def register_feed_forward(kind: str, config: type[FeedForwardConfig]):
    """Class decorator: `kind` in a config builds this feed-forward."""

    def add(cls: type[FeedForward]) -> type[FeedForward]:
        FEED_FORWARDS.register(kind, config, cls)
        return cls

    return add


def build_feed_forward(config: FeedForwardConfig, context: LayerContext) -> FeedForward:
    return FEED_FORWARDS[config.kind][1].build(config, context)
