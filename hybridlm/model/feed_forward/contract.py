"""The contract of a feed-forward: the methods of its config and of its module, and the registry of kinds.

A kind is one config class and one module class. Abstract methods have to be written; all others have an answer that
suits a plain feed-forward without routed experts. Nothing outside the kind's file knows its classes.

B rows, T tokens, N = B * T, D hidden size, E routed experts, A experts per token.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from hybridlm.errors import ConfigError
from hybridlm.kind_registry import KindRegistry
from hybridlm.model.decode_step import DecodeStep
from hybridlm.model.fp32_parameters import KeepsFP32
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.plain_data import to_dict


@dataclass(frozen=True)
class RoutedExperts:
    """Numbers of routed experts of a layer that has them.

    Args:
        total: experts of the layer.
        per_token: experts that each token meets.
        num_groups: groups of equal size that the router divides the experts into.
        topk_groups: groups that a token's experts may come from.
        latent_size: width of their inputs and outputs; None: the model's.
    """

    total: int
    per_token: int
    num_groups: int = 1
    topk_groups: int = 1
    latent_size: int | None = None

    def width(self, hidden_size: int) -> int:
        """Width of their inputs and outputs in a model of this width.

        >>> RoutedExperts(8, 2).width(64), RoutedExperts(8, 2, latent_size=16).width(64)
        (64, 16)
        """
        return self.latent_size or hidden_size


@dataclass(kw_only=True)
class FeedForwardConfig(abc.ABC):
    """Base of every feed-forward's config. `residual: null` follows the layer's mixer.

    Costs are known from the config alone. FLOPs count a multiply-add as 2, forward only.
    """

    kind: str
    residual: BranchConfig | None = None
    is_branch: ClassVar[bool] = True  # False: the layer has no feed-forward, only a mixer
    loss_names: ClassVar[tuple[str, ...]] = ()  # of all losses that its layers' aux may have, without "loss/"
    keeps_state: ClassVar[bool] = False  # its output depends on earlier tokens, of which it keeps something in decoding

    # Costs

    @abc.abstractmethod
    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        """Number of parameters of the feed-forward.

        Args:
            context: the layer.
            active: count only those that one token uses.
        """

    @abc.abstractmethod
    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        """Forward FLOPs per token, by part of the feed-forward.

        Args:
            context: the layer.

        Returns:
            FLOPs by name of the part, such as `experts`; the names stand in the table of `hybridlm inspect`.
        """

    def lookup_params(self, context: LayerContext) -> int:
        """The part of `num_params` that stands in tables of which a token reads one row and multiplies no matrix."""
        return 0

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token that the feed-forward keeps for its backward pass: an estimate from its tensors' widths.

        By default one number per row of each of its matrices, which are taken to read or write the model's width.

        Args:
            context: the layer.
            element_bytes: bytes of one number of an activation, 2 under bf16.
        """
        return element_bytes * self.num_params(context) / context.hidden_size

    def own_losses(self) -> tuple[str, ...]:
        """Those of `loss_names` that it has as it is configured: one with the coefficient 0 may not be computed."""
        return self.loss_names

    # Routed experts

    def routed_experts(self) -> RoutedExperts | None:
        """Routed experts of each layer that has some; None where no layer has."""
        return None

    def balance_warning(self) -> str:
        """Say that nothing balances the loads of experts, or nothing where something does or there are none."""
        return ""

    def balance_advice(self) -> str:
        """Say which options, with which values, balance the loads of routed experts better; empty where none does."""
        return ""

    def routed_params(self, context: LayerContext) -> int:
        """Number of parameters that belong to routed experts: those that expert parallelism shards."""
        return 0

    def step_sum_numbers(self, layer_index: int) -> int:
        """Numbers in the `step_sums` of a layer, by default the loads of its experts."""
        experts = self.routed_experts()
        return experts.total if experts is not None and self.is_moe(layer_index) else 0

    def is_moe(self, layer_index: int) -> bool:
        """Whether the layer has routed experts."""
        return self.routed_experts() is not None

    def layer_kind(self, layer_index: int) -> str:
        """Name the feed-forward of a layer in reports; by default the kind, for all layers."""
        return self.kind

    # Decode state, for a kind that looks at earlier tokens

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of decode state for one sequence after `context_length` tokens; a kind that `keeps_state` counts it."""
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
        """Bytes that a training step exchanges where `rows` rows are divided into shards.

        Args:
            context: the layer.
            rows: rows of a micro batch.
            length: tokens per row in one shard.
            shards: number of shards.
            element_bytes: bytes per element of an activation.

        Returns:
            The bytes of each kind of exchange; none by default.
        """
        return []

    # Comparison and sizes

    def canonical(self, context: LayerContext) -> dict[str, Any]:
        """The options that the outputs of the layer depend on, as plain data, without the residual."""
        data = to_dict(self)
        data.pop("residual")
        return data

    def width(self) -> int | None:
        """The inner width, by which a sweep makes models equally large: of one expert where there are several.

        By default `intermediate_size`; None where a kind has nothing of the sort.
        """
        return getattr(self, "intermediate_size", None)

    def with_width(self, width: int) -> Self:
        """The same feed-forward with another inner width; widths written out beside it keep their proportion."""
        return dataclasses.replace(self, intermediate_size=width)  # type: ignore[call-arg]

    def at_width(self, factor: Fraction) -> Self:
        """The same feed-forward in a model whose hidden size is `factor` times as large; experts stay as many."""
        width = self.width()
        return self if width is None or factor == 1 else self.with_width(max(1, round(width * factor)))


# (tokens [N, D], expert ids [N, A], weights [N, A]) -> outputs [N, D] of the experts on this process.
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
# Brings tokens to the processes that own their experts, computes there, and brings the results back.
Dispatch = Callable[[Compute, Tensor, Tensor, Tensor], Tensor]


class ExpertStack(nn.Module, abc.ABC):
    """Weights of a layer's routed experts, all parameters [E, ...], which expert parallelism shards over processes.

    `num_experts` counts the experts of the layer, `owned` are the indices of those on this process.
    """

    num_experts: int
    owned: range

    @abc.abstractmethod
    def keep_only(self, owned: range, dispatch: Dispatch) -> None:
        """Drop all experts except `owned`; from then on `dispatch` sends tokens to the processes of their experts."""


class FeedForward(KeepsFP32, abc.ABC):
    """A module that works on each token: x [B, T, D] -> y [B, T, D].

    Most kinds look at one token alone. One that also looks at earlier tokens (a token shift) sets `keeps_state` in its
    config and keeps to the contract of a mixer: documents of `seq` never see each other, decoding with the state of
    `new_state` gives what the full forward gives, and so do rows that are divided into shards.

    A forward changes nothing in the module: what a layer must remember of a batch (expert loads) it returns in its
    aux, and the model passes it to `record` once. So a forward may be computed again, as activation
    checkpointing does, without counting anything twice.

    `fp32_parameters` are names of parameters, or their last parts, that stay in fp32 (`KeepsFP32`).
    """

    @classmethod
    def build(cls, config: FeedForwardConfig, context: LayerContext) -> FeedForward:
        """Build the module of layer `context.layer_index`; a kind whose layers differ overrides this."""
        return cls(config, context)  # type: ignore[call-arg]

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each "loss/..." in the aux; a loss not named here is only reported."""
        return {}

    @abc.abstractmethod
    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: Any | None = None) -> tuple[Tensor, Aux]:
        """Compute the output of every token.

        Args:
            x_BTD: input of the branch.
            seq: positions and borders of the documents.
            state: this layer's decode state from `new_state`, updated in place; None in training.

        Returns:
            y [B, T, D], and the layer's losses and statistics.
        """

    @abc.abstractmethod
    def init_weights(self, std: float) -> None:
        """Set every parameter and buffer to its initial value; plain projections are normal(0, std)."""

    def new_state(self, batch: int, max_length: int) -> Any:
        """Empty decode state for `batch` sequences of at most `max_length` tokens; None for a kind without state."""
        return None

    def prepare_step(self) -> DecodeStep | None:
        """Prepare decoding of one token per row without gradients, as `SequenceMixer.prepare_step`.

        Returns:
            A function of (x [B, 1, D], seq, state) that returns what `forward` would; None: `forward` itself decodes.
        """
        return None

    def record(self, aux: Aux) -> None:
        """Take from the aux of one training forward what the next optimizer step needs."""

    def post_optimizer_step(self, update: bool = True) -> None:
        """Update what depends on the last step (router biases) after an optimizer step.

        Args:
            update: False after a step that was skipped: forget its counts, change nothing else.
        """

    def balanced_weight(self) -> nn.Parameter | None:
        """The weight in training that `post_optimizer_step` balances by a bias; None where that call moves nothing."""
        return None

    def expert_stacks(self) -> dict[str, ExpertStack]:
        """The routed experts, by the name of their submodule."""
        return {}

    def router_load(self) -> Tensor | None:
        """Tokens that each expert got since the last optimizer step: an int64 [E] buffer, or None without experts."""
        return None

    def step_sums(self) -> list[Tensor]:
        """Buffers that `record` adds to, and ranks sum in place before `post_optimizer_step`; by default the loads."""
        load = self.router_load()
        return [] if load is None else [load]

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of every parameter of the feed-forward, by its name within the feed-forward.

        Raises:
            TypeError: a parameter that is neither a linear map nor a vector, and that the kind does not declare.
        """
        return find_roles(self)


FEED_FORWARDS = KindRegistry("feed-forward", FeedForwardConfig)


def register_feed_forward(kind: str, config: type[FeedForwardConfig]):
    """Class decorator that registers a feed-forward: `kind` in a config builds it.

    Raises:
        KindError: the name is taken, or one of the classes lacks a method of the contract.
    """

    def add(cls: type[FeedForward]) -> type[FeedForward]:
        FEED_FORWARDS.register(kind, config, cls)
        return cls

    return add


def build_feed_forward(config: FeedForwardConfig, context: LayerContext) -> FeedForward:
    """Build the module of a feed-forward's config.

    Args:
        config: the config of any registered kind.
        context: the layer.

    Returns:
        The module, not yet initialised.
    """
    return FEED_FORWARDS.implementation(config.kind).build(config, context)
