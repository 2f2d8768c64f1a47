"""The layers of a model, one after the other, between the start and the end of their residual stream.

B rows, T tokens per row, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hybridlm.model.activation_checkpointing import run_checkpointed
from hybridlm.model.block import Block
from hybridlm.model.config import ModelConfig
from hybridlm.model.decode_state import LayerState
from hybridlm.model.mtp import MTPModule
from hybridlm.model.output import AuxTotals
from hybridlm.model.residual.contract import Residual, Stream
from hybridlm.model.run_adapters import check_run_adapters
from hybridlm.model.sequence import SequenceInfo


def build_layers(config: ModelConfig) -> nn.ModuleList:
    """Build the layers of a model, each once, however often it runs.

    Raises:
        ConfigError: adapters that name nothing in the layers that run several times.
    """
    order = config.runs()
    layers = [Block(config, name, index, runs=order.count(index)) for index, name in enumerate(config.layers())]
    several = [layer for layer in layers if order.count(layer.layer_index) > 1]
    if several and config.schedule.run_adapters is not None:
        check_run_adapters([*several], config.schedule.run_adapters,
                           {pattern for layer in several for pattern in layer.used_adapters})
    return nn.ModuleList(layers)


def number_runs(order: Sequence[int]) -> list[tuple[int, int]]:
    """Pair the layer of each run with the number of its earlier runs.

    >>> number_runs([0, 1, 1, 2])
    [(0, 0), (1, 0), (1, 1), (2, 0)]
    """
    return [(layer, list(order[:place]).count(layer)) for place, layer in enumerate(order)]


def run_label(layer: int, number: int) -> str:
    """Name of a run of a layer in statistics.

    >>> run_label(3, 0), run_label(3, 2)
    ('3', '3.2')
    """
    return f"{layer}.{number}" if number else str(layer)


def run_layers(layers: nn.ModuleList, runs: Sequence[tuple[int, int]], residual: Residual, embedding_BTD: Tensor,
               seq: SequenceInfo, totals: AuxTotals, states: Sequence[LayerState] | None, hidden: list[Tensor] | None,
               checkpointing: bool) -> Tensor:
    """Run all layers of a model.

    Args:
        layers: the layers.
        runs: the layer and the number of each run, in their order.
        residual: begins and ends the stream that goes through them.
        embedding_BTD: the embedding of the tokens.
        seq: positions and documents of the tokens.
        totals: gets the aux of the layers.
        states: the decode state of each run, updated in place; None when training.
        hidden: gets the end of the stream before the first run and after each one; None: nobody asks for it.
        checkpointing: whether to keep only the inputs of layers for the backward.

    Returns:
        The input [B, T, D] of the final norm.
    """
    stream = residual.start(embedding_BTD)
    if hidden is not None:
        hidden.append(residual.end(stream))
    for place, (index, number) in enumerate(runs):
        state = None if states is None else states[place]
        stream = run_layer(layers[index], run_label(index, number), stream, seq, totals, checkpointing, state, number)
        if hidden is not None:
            hidden.append(residual.end(stream))
    return residual.end(stream) if hidden is None else hidden[-1]


def run_layer(module: nn.Module, label: str, stream: Stream, seq: SequenceInfo, totals: AuxTotals, checkpointing: bool,
              *extra: Any) -> Stream:
    """Run one layer, or a module of multi-token prediction, under activation checkpointing if that is on.

    Its aux goes to `totals` and its loads to its buffers, once, however often the layer is computed again.

    Args:
        module: a `Block`, or an `MTPModule` around one.
        label: name of the layer in the statistics.
        stream: what the module gets first.
        seq: positions and documents of the tokens.
        totals: gets the aux of the layer.
        checkpointing: whether to keep only the inputs of the layer for the backward.
        extra: what else the module gets.

    Returns:
        The first result of the module.
    """
    if checkpointing and module.training and torch.is_grad_enabled():
        stream, aux = run_checkpointed(module, stream, seq, *extra)
    else:
        stream, aux = module(stream, seq, *extra)
    block = cast(Block, module.block if isinstance(module, MTPModule) else module)
    totals.add(block.mixer, aux["mixer"], label)
    totals.add(block.feed_forward, aux["feed_forward"], label)
    if module.training:
        block.record(aux)
    return stream
