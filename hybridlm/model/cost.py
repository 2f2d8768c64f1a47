"""Costs of a model from its config alone: parameters, FLOPs, decode state. No tensor is made.

The numbers come from the cost methods of the mixers, the feed-forwards and the residual; this file adds what belongs to
the model: norms, embedding, head, multi-token prediction. FLOPs count a multiply-add as 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from hybridlm.errors import ConfigError
from hybridlm.model.block import Block
from hybridlm.model.config import ModelConfig
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.residual import BRANCH_NAMES
from hybridlm.model.run_adapters import PerRunLinear

BACKWARD = 2.0  # FLOPs of the backward pass over those of the forward: one product for inputs, one for weights


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Parameters of one layer; `active` are those that one token meets, without tables that it looks rows up in."""

    index: int
    mixer: str  # its name in the schedule
    kind: str
    feed_forward: str
    mixer_params: int
    feed_forward_params: int
    feed_forward_active: int
    routed_params: int
    lookup_params: int  # of mixer and feed-forward, in tables of which a token reads a few rows
    norm_params: int
    residual_params: int
    projection_params: int  # of the branches' outputs
    runs: int  # of the layer in one forward; what single runs have for themselves is counted where it stands

    @property
    def params(self) -> int:
        own = self.mixer_params + self.feed_forward_params + self.norm_params
        return own + self.residual_params + self.projection_params

    @property
    def active(self) -> int:
        read = self.mixer_params + self.feed_forward_active - self.lookup_params
        return read + self.norm_params + self.residual_params + self.projection_params


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model. `embedding` and `head` are counted once when they are tied (head 0)."""

    layers: list[LayerCost]
    embedding: int
    head: int
    norm: int
    residual: int  # outside the layers
    mtp: int
    mtp_active: int
    mtp_routed: int
    mtp_lookup: int

    @property
    def lookup(self) -> int:
        """Parameters of tables that layers look rows up in, those of multi-token prediction included."""
        return sum(layer.lookup_params for layer in self.layers) + self.mtp_lookup

    @property
    def routed(self) -> int:
        """Parameters of all routed experts, those of multi-token prediction included."""
        return sum(layer.routed_params for layer in self.layers) + self.mtp_routed

    @property
    def total(self) -> int:
        """All parameters but those of multi-token prediction, which published totals leave out."""
        return sum(layer.params for layer in self.layers) + self.norm + self.residual + self.embedding + self.head

    @property
    def total_with_mtp(self) -> int:
        """All parameters: what the built model has."""
        return self.total + self.mtp

    @property
    def active(self) -> int:
        """Parameters that one token meets, without embedding and head, as most published counts are made."""
        return sum(layer.active for layer in self.layers) + self.norm + self.residual

    @property
    def active_with_head(self) -> int:
        """Parameters that multiply something for a token: the embedding is only looked up."""
        return self.active + (self.head or self.embedding)

    @property
    def active_with_embeddings(self) -> int:
        """Parameters that one token meets, embedding and head included."""
        return self.active + self.embedding + self.head


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters by layer and part, equal to those of the built model.

    Raises:
        ConfigError: a part that does not fit into its layer.
    """
    layers = [_layer_cost(config, index, name) for index, name in enumerate(config.layers())]
    table = config.vocab_size * config.hidden_size
    block = _layer_cost(config, *mtp_block(config), config.mtp_context())
    residual = config.residual.num_params(config.layer_context(0))
    # Two norms and a projection in, one norm out, and a residual; embedding and head are the model's.
    around = 2 * config.hidden_size**2 + 3 * config.hidden_size + config.residual.num_params(config.mtp_context())
    return ParameterCount(layers=layers, embedding=table, head=0 if config.tie_embeddings else table,
                          norm=config.hidden_size, residual=residual, mtp=config.mtp.depth * (around + block.params),
                          mtp_active=config.mtp.depth * (around + block.active),
                          mtp_routed=config.mtp.depth * block.routed_params,
                          mtp_lookup=config.mtp.depth * block.lookup_params)


def mtp_block(config: ModelConfig) -> tuple[int, str]:
    """Layer index and mixer name of the block of a multi-token prediction module."""
    return config.num_layers - 1, config.mtp.mixer or config.layers()[-1]


def all_blocks(config: ModelConfig) -> list[tuple[int, str]]:
    """Layer index and mixer name of every layer, then of the block of each multi-token prediction module."""
    return [*enumerate(config.layers()), *[mtp_block(config)] * config.mtp.depth]


def all_runs(config: ModelConfig) -> list[tuple[int, str]]:
    """Layer index and mixer name of all blocks in the order of the forward, each as often as it runs."""
    layers = config.layers()
    return [*((index, layers[index]) for index in config.runs()), *[mtp_block(config)] * config.mtp.depth]


def forward_flops(config: ModelConfig, context_length: int, *, mtp: bool = True) -> dict[str, float]:
    """Forward FLOPs per token, by part of the model, the mean over a causal sequence of `context_length` tokens.

    Keys: "NAME.PART" for mixers (by their name in the schedule), "feed_forward.PART", "residual" where it multiplies
    matrices, "head", and "mtp" for all of multi-token prediction. Norms, activations and the embedding's look-up are
    left out.
    """
    parts: dict[str, float] = {}
    layers, order = config.layers(), config.runs()
    for index in dict.fromkeys(order):
        runs = order.count(index)
        for part, flops in _layer_flops(config, index, layers[index], context_length):
            parts[part] = parts.get(part, 0.0) + runs * flops
        if adapters := sum(linear.run_flops() for _, linear in _per_run_linears(config, index)):
            parts["run adapters"] = parts.get("run adapters", 0.0) + adapters
    if end := config.residual.end_flops_per_token(config.layer_context(0)):
        parts["residual"] = parts.get("residual", 0.0) + end
    head = 2.0 * config.hidden_size * config.vocab_size
    parts["head"] = head
    if mtp and config.mtp.depth:
        stream = config.mtp_context()
        block = sum(flops for _, flops in _layer_flops(config, *mtp_block(config), context_length, stream))
        block += config.residual.end_flops_per_token(stream)
        parts["mtp"] = config.mtp.depth * (4.0 * config.hidden_size**2 + block + head)
    return parts


def training_parts(config: ModelConfig, context_length: int) -> dict[str, float]:
    """FLOPs per token of one training step, by phase. What activation checkpointing computes again does not count.

    The selection of keys has no backward: an indexer learns from its own loss.

    Args:
        config: the model.
        context_length: tokens per sequence.

    Returns:
        `forward`, `backward`, and `selector_losses`: what selectors of keys learn from, forward and backward.
    """
    forward = sum(forward_flops(config, context_length).values())
    forward_only = sum(config.mixers[name].forward_only_flops_per_token(config.layer_context(index), context_length)
                       for index, name in all_runs(config))
    return {"forward": forward, "backward": BACKWARD * (forward - forward_only),
            "selector_losses": selector_loss_flops(config, context_length)}


def selector_loss_flops(config: ModelConfig, context_length: int, weights: Mapping[str, float] = MappingProxyType({})
                        ) -> float:
    """FLOPs per token of the losses that mixers compute for their selectors of keys, forward and backward.

    Args:
        config: the model.
        context_length: tokens per sequence.
        weights: weights of losses by name; a mixer whose losses all have weight 0 computes none.
    """
    return sum(config.mixers[name].loss_flops_per_token(config.layer_context(index), context_length)
               for index, name in all_runs(config)
               if not (names := config.mixers[name].own_losses()) or any(weights.get(loss) != 0 for loss in names))


def training_flops(config: ModelConfig, context_length: int) -> float:
    """FLOPs per token of one training step of the whole model, the numerator of model FLOPs utilisation (MFU).

    `hybridlm.training.stage_flops` counts stages that train a part of it or learn from a teacher.

    Args:
        config: the model.
        context_length: tokens per sequence.

    Returns:
        The sum of `training_parts`.
    """
    return sum(training_parts(config, context_length).values())


def mixer_forward_flops(config: ModelConfig, layers: Iterable[int], context_length: int) -> float:
    """Forward FLOPs per token of the mixers of some layers, in all of their runs.

    Args:
        config: the model.
        layers: their indices.
        context_length: tokens per sequence.
    """
    names, order = config.layers(), config.runs()
    return sum(order.count(index)
               * sum(config.mixers[names[index]].flops_per_token(config.layer_context(index), context_length).values())
               for index in layers)


def decode_state_bytes(config: ModelConfig, context_length: int, element_bytes: int = 2) -> int:
    """Bytes of decode state of one sequence after `context_length` tokens; each run of a layer has a state."""
    total = 0
    layers = config.layers()
    for index in config.runs():
        name = layers[index]
        context = config.layer_context(index)
        total += config.mixers[name].state_bytes(context, context_length, element_bytes)
        total += config.feed_forward_after(name).state_bytes(context, context_length, element_bytes)
    return total


def _layer_cost(config: ModelConfig, index: int, name: str, stream: LayerContext | None = None) -> LayerCost:
    """Parameters of a layer; `stream` is what the residual of a block of multi-token prediction is told, None: this is
    a layer of the model."""
    mixer = config.mixers[name]
    feed_forward, branches = config.feed_forward_after(name), config.present_branches(name)
    context = config.layer_context(index)
    residual = config.residual
    told = stream or context
    wide = context.mixer_width - context.hidden_size  # beyond the norm of a mixer's input that has the model's width
    of_runs: Counter[str] = Counter()
    for path, linear in [] if stream is not None else _per_run_linears(config, index):
        of_runs[path.partition(".")[0]] += linear.run_params()
    in_mixer, in_feed_forward = of_runs.pop("mixer", 0), of_runs.pop("feed_forward", 0)
    try:
        return LayerCost(
            index=index, mixer=name, kind=mixer.kind, feed_forward=feed_forward.layer_kind(index),
            lookup_params=mixer.lookup_params(context) + feed_forward.lookup_params(context),
            mixer_params=mixer.num_params(context) + in_mixer,
            feed_forward_params=feed_forward.num_params(context) + in_feed_forward,
            feed_forward_active=feed_forward.num_params(context, active=True) + in_feed_forward,
            routed_params=feed_forward.routed_params(context),
            norm_params=len(branches) * residual.norm_params(told) + wide,
            residual_params=sum(residual.branch_params(told, branch) for branch in branches),
            projection_params=_projections(config, name) * config.hidden_size**2 + of_runs.total(),
            runs=config.runs().count(index) if stream is None else 1)
    except ConfigError as error:
        raise error.within("model") from None


def _per_run_linears(config: ModelConfig, index: int) -> list[tuple[str, PerRunLinear]]:
    """The linear maps of a layer, by name, that differ between its runs; for them alone a layer is built."""
    runs = config.runs().count(index)
    if runs == 1 or config.schedule.run_adapters is None:
        return []
    with torch.device("meta"):
        layer = Block(config, config.layers()[index], index, runs=runs)
    return [(path, module) for path, module in layer.named_modules() if isinstance(module, PerRunLinear)]


def _projections(config: ModelConfig, name: str) -> int:
    """Number of projections of the outputs of branches in a layer."""
    branches = dict(zip(BRANCH_NAMES, config.branches(name), strict=True))
    return sum(branches[key].project for key in config.present_branches(name))


def _layer_flops(config: ModelConfig, index: int, name: str, context_length: int,
                 stream: LayerContext | None = None) -> Iterator[tuple[str, float]]:
    context = config.layer_context(index)
    for part, flops in config.mixers[name].flops_per_token(context, context_length).items():
        yield f"{name}.{part}", flops
    for part, flops in config.feed_forward_after(name).flops_per_token(context).items():
        yield f"feed_forward.{part}", flops
    branches = config.present_branches(name)
    if residual := sum(config.residual.flops_per_token(stream or context, branch) for branch in branches):
        yield "residual", residual
    if projections := _projections(config, name):
        yield "branch projections", 2.0 * projections * config.hidden_size**2
