"""The contract of a sequence mixer: the methods of its config, and the registry of kinds; `module.py` has its module's.

A kind is one config class and one module class in one file. Abstract methods have to be written; all others have an
answer that suits a plain mixer. Nothing outside the kind's file knows its classes.

B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hybridlm.errors import ConfigError
from hybridlm.kind_registry import KindRegistry
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.module import AttentionMode as AttentionMode
from hybridlm.model.mixers.module import Aux as Aux
from hybridlm.model.mixers.module import SequenceMixer as SequenceMixer
from hybridlm.model.mixers.sizing import HeadSizes, ModelSizes, fill_missing, missing_fields, scale_heads
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.sharing import SharedKind, SharedRead
from hybridlm.plain_data import to_dict


@dataclass(kw_only=True)
class MixerConfig(abc.ABC):
    """Base of every mixer's config. A subclass gets its `kind` from `@register_mixer`.

    Costs are known from the config alone. FLOPs count a multiply-add as 2; where nothing else is said they are those
    of the forward.
    """

    kind: str
    residual: BranchConfig = field(default_factory=BranchConfig)
    is_branch: ClassVar[bool] = True  # False: the layer has no mixer, only a feed-forward
    is_linear: ClassVar[bool] = False  # decode state of fixed size: no cost per token grows with context
    takes_wide_input: ClassVar[bool] = False  # its input may have another width (`LayerContext.mixer_width`)
    # parameters that hold q, k, v and o of softmax attention where the mixer starts from it
    attention_weights: ClassVar[tuple[str, ...]] = tuple(f"{name}_proj.weight" for name in "qkvo")
    loss_names: ClassVar[tuple[str, ...]] = ()  # of all losses that its layers' aux may have, without "loss/"

    # Costs

    @abc.abstractmethod
    def num_params(self, context: LayerContext) -> int:
        """Number of parameters of the mixer, without the norm before it.

        Args:
            context: the layer.
        """

    @abc.abstractmethod
    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """Forward FLOPs per token, by part of the mixer, averaged over a causal sequence.

        Args:
            context: the layer.
            context_length: tokens of the sequence.

        Returns:
            FLOPs by name of the part, such as `projections`; the names stand in the table of `hybridlm inspect`.
        """

    @abc.abstractmethod
    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of decode state for one sequence after `context_length` tokens.

        Args:
            context: the layer.
            context_length: tokens of the sequence.
            element_bytes: bytes per element of what the layer keeps in the dtype of the model.
        """

    def forward_only_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        """The part of `flops_per_token` that has no backward, such as a selection of keys."""
        return 0.0

    def lookup_params(self, context: LayerContext) -> int:
        """The part of `num_params` that stands in tables of which a token reads a few rows and multiplies none."""
        return 0

    def loss_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        """FLOPs per token of a loss that the mixer computes for itself in training, its whole backward included."""
        return 0.0

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token that the mixer keeps for its backward pass: an estimate from the widths of its tensors.

        A kind without a formula of its own is taken to keep three tensors per output of each projection.

        Args:
            context: the layer.
            element_bytes: bytes of one number of an activation, 2 under bf16.
        """
        return 3.0 * element_bytes * self.num_params(context) / context.hidden_size

    def own_losses(self) -> tuple[str, ...]:
        """Those of `loss_names` that it has as it is configured: without a selector none of a selector's."""
        return self.loss_names

    # Values that layers share

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        """Kinds of values that the layer can leave for later layers; see `hybridlm.model.sharing`."""
        return ()

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        """Values of earlier layers that the layer reads."""
        return ()

    def check_sources(self, context: LayerContext) -> None:  # noqa: B027
        """Raise ConfigError where the layer does not fit the layers that it reads; each of `reads` has one."""

    def shared_width(self, kind: SharedKind, context: LayerContext) -> int:
        """Numbers per token of a value that the layer leaves, for readers whose parameters follow from it.

        Args:
            kind: one of `leaves`.
            context: the layer.

        Raises:
            TypeError: the kind of value has no width, or the mixer does not say it.
        """
        raise TypeError(f"{type(self).__name__} does not say the width of {kind.name}")

    def shared_layout(self, kind: SharedKind, context: LayerContext) -> Any:
        """Describe a value that the layer leaves, such as its heads, in the type that the kind of value defines.

        Args:
            kind: one of `leaves`.
            context: the layer.

        Raises:
            TypeError: the mixer does not say it.
        """
        raise TypeError(f"{type(self).__name__} does not say the layout of {kind.name}")

    # Rows that are divided between processes

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Refuse rows that are divided into `shards` of `length` tokens (see `hybridlm.model.context_parallel`).

        Raises:
            ConfigError: the mixer cannot work on them; by default none can.
        """
        raise ConfigError("kind", "cannot work on split rows", got=self.kind, expected="engine.context_parallel=1")

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """Bytes that a training step exchanges where `rows` rows are divided into shards.

        A kind whose `check_context_parallel` accepts such rows has to count them.

        Args:
            context: the layer.
            rows: rows of a micro batch.
            length: tokens per row in one shard.
            shards: number of shards.
            element_bytes: bytes per element of an activation.

        Returns:
            The bytes of each kind of exchange.

        Raises:
            ConfigError: the kind does not count them, which is the default.
        """
        raise ConfigError("kind", "does not count what shards of a row exchange", got=self.kind,
                          expected="engine.context_parallel=1")

    # Comparison with other configs

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        """The options that the outputs depend on, as plain data: configs that agree here are one mixer.

        A kind leaves out what only says how weights start or train, writes out what null stands for, and drops options
        to which another option gives no effect.

        Args:
            norm: that of the model, for options that follow it: `norm_eps` does where it is null.
        """
        data = to_dict(self)
        return data | {"norm_eps": norm.eps_or(data["norm_eps"])} if "norm_eps" in data else data

    # Sizes

    def head_sizes(self) -> HeadSizes | None:
        """Heads that other mixers of the model may follow; None where the kind has none."""
        heads, head_dim = getattr(self, "num_heads", None), getattr(self, "head_dim", None)
        return HeadSizes(heads, head_dim) if heads and head_dim else None

    @classmethod
    def missing_sizes(cls, options: Mapping[str, Any]) -> list[str]:
        """Options without a default that `options` leave open."""
        return missing_fields(cls, options)

    @classmethod
    def idle_options(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        """Options without an effect because others share a value of an earlier layer: dotted path -> these others.

        A person who gives one gets an error; `canonical` leaves it out.

        Args:
            options: plain data of this kind, as a person gives it.
        """
        return {}

    @classmethod
    def fill_sizes(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """`options` with the sizes they leave open, from the model: how a preset fits into any model.

        Options that are given stay. Kinds whose blocks or selections follow the longest context fill these in too.

        Args:
            options: plain data of this kind, possibly without heads and dims.
            model: width and mixers of the model.
        """
        required = cls.missing_sizes(options)
        return fill_missing(options, cls.sizes_from(options, model), required) if required else dict(options)

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Every size option with a value that suits `model`; by default `num_heads` and `head_dim`, if they exist."""
        heads = model.heads_for(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        found = {"num_heads": heads.num_heads, "head_dim": heads.head_dim}
        return {key: value for key, value in found.items() if key in known}

    def state_heads(self) -> int | None:
        """Heads in the decode state, whose number a sweep may change to match states; None where it has none."""
        return None

    def with_state_heads(self, count: int) -> Self:
        """The same mixer with `count` heads in its decode state; heads that share one stay as many as they were.

        Raises:
            TypeError: the kind has no such heads.
        """
        raise TypeError(f"{type(self).__name__} has no heads in its decode state")

    def at_width(self, factor: Fraction) -> Self:
        """The same mixer in a model whose hidden size is `factor` times as large, with dims per head as they are.

        Args:
            factor: hidden size of the new model over that of the old.

        Raises:
            ConfigError: a number of heads that would not be whole.
        """
        return dataclasses.replace(self, **scale_heads(self, factor)) if factor != 1 else self

    def transfer_gaps(self) -> list[str]:
        """Name what has no published rule for carrying hyperparameters over width, one phrase each.

        By default the whole mixer: its matrices get the factors of their shape, which nobody has checked.
        """
        return [f"mixers of kind '{self.kind}'"]

    # Changes to a trained model

    def rotates(self) -> bool:
        """Whether queries and keys are rotated by their position (RoPE)."""
        return False

    def has_indexer(self) -> bool:
        """Whether the mixer reads only keys that an indexer selects."""
        return False

    def has_selector(self) -> bool:
        """Whether the mixer reads blocks that a selector chooses, which a training stage may switch to all keys."""
        return False

    def with_attention_mode(self, mode: AttentionMode) -> Self:
        """The same mixer attending to all keys (`dense`) or to what it selects (`sparse`), where it has a selector."""
        return self

    def topk_multiple(self) -> int:
        """Tokens that are selected together: a top-k that a training stage sets must be a multiple of it."""
        return 1

    def with_topk(self, topk: int) -> Self:
        """The same mixer reading `topk` selected tokens per query, a multiple of `topk_multiple`, where it selects.

        Raises:
            ConfigError: too few for what the mixer always reads.
        """
        return self

    def selector_parameters(self) -> tuple[str, ...]:
        """Shell patterns over the mixer's parameter names: those of a selector that a loss of its own trains."""
        return ()

    @classmethod
    def indexer_options(cls, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The options of an indexer, where attention of any kind becomes what `options` describe by getting it.

        Args:
            options: plain data of this kind.

        Returns:
            Options of an IndexerConfig; None where a mixer of this kind has to take the place of attention.
        """
        return None

    def can_take_indexer(self) -> bool:
        """Whether `with_indexer` would make the mixer sparse: it attends to all earlier tokens by softmax."""
        return False

    def indexer_topk(self) -> int | None:
        """Keys that the mixer's own indexer selects; None where it has none."""
        return None

    def indexer_sizes(self, options: Mapping[str, Any], max_position: int) -> dict[str, Any]:
        """Options of an indexer for this mixer, with the sizes that `options` leave open.

        Args:
            options: plain data of an IndexerConfig.
            max_position: longest context of the model.

        Raises:
            ConfigError: the mixer cannot take an indexer.
        """
        raise ConfigError("kind", "cannot take an indexer", got=self.kind, expected="softmax attention over all tokens")

    def with_indexer(self, indexer: Any) -> Self:
        """The same mixer reading the keys that an indexer selects.

        Args:
            indexer: an IndexerConfig.

        Raises:
            ConfigError: the mixer cannot take it.
        """
        raise ConfigError("kind", "cannot take an indexer", got=self.kind, expected="softmax attention over all tokens")

    def projection_heads(self) -> dict[str, tuple[int, int]]:
        """Shape by heads of the attention projections that another mixer may start from.

        Returns:
            (heads, dims per head) of `q_proj`, `k_proj`, `v_proj` (rows) and `o_proj` (columns), those that the mixer
            has as plain matrices.
        """
        return {}

    def key_factor(self) -> float:
        """Fixed factor of keys as they are projected, which a mixer that takes over the projection has to keep."""
        return 1.0

    def initial_weights_from(self, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig) -> dict[str, Tensor]:
        """Weights that this mixer takes over from the one it replaces, by parameter name; by default none.

        Args:
            old: config of the replaced mixer.
            tensors: its parameters, by name within the mixer.
            norm: that of the model, which says what the weights of norms mean.

        Returns:
            Whole tensors of this mixer; their elements that are NaN keep their fresh values.
        """
        return {}

    def can_start_from(self, old: MixerConfig) -> bool:
        """Whether the mixer takes over all of q, k, v and o of the softmax attention `old`."""
        heads = old.projection_heads()
        tensors = {f"{name}.weight": torch.empty((1, count * dim) if name == "o_proj" else (count * dim, 1),
                                                 device="meta") for name, (count, dim) in heads.items()}
        return len(heads) == 4 and set(self.attention_weights) <= set(
            self.initial_weights_from(old, tensors, NormConfig()))

    def adapted_to(self, old: MixerConfig) -> Self:
        """The same mixer with those options that must be as in the attention it starts from (rotation, biases, ...)."""
        return self

    def calibrated_form(self) -> Self:
        """The same mixer in the form that `SequenceMixer.calibrate` can set: gates that have an open state."""
        return self

    def with_window(self, window: int, first_tokens: int) -> Self:
        """The same softmax attention, limited to a window and the first tokens of each document.

        Args:
            window: keys that a token sees, its own included.
            first_tokens: keys at the start of its document that it always sees.

        Raises:
            ConfigError: the mixer is no softmax attention, or has no such form.
        """
        raise ConfigError("kind", "has no form with a window and first tokens", got=self.kind, expected="attention")


MIXERS = KindRegistry("mixer", MixerConfig)


def register_mixer(kind: str, config: type[MixerConfig]):
    """Class decorator that registers a mixer: `kind` in a config builds it. Only registered kinds can be built.

    Raises:
        KindError: the name is taken, or one of the classes lacks a method of the contract.
    """

    def add(cls: type[SequenceMixer]) -> type[SequenceMixer]:
        MIXERS.register(kind, config, cls)
        return cls

    return add


def build_mixer(config: MixerConfig, context: LayerContext) -> SequenceMixer:
    """Build the module of a mixer's config.

    Args:
        config: the config of any registered kind.
        context: the layer.

    Returns:
        The module, not yet initialised.
    """
    return MIXERS.implementation(config.kind)(config, context)
