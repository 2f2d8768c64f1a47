"""Functions that run in place of the mixers of some layers: a window of the same attention, or no linear branch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from hybridlm.model.block import Block, MixerStandIn
from hybridlm.model.mixers.contract import Aux, SequenceMixer, build_mixer
from hybridlm.model.model import HybridLM
from hybridlm.model.sequence import SequenceInfo


def block_of(model: HybridLM, layer: int) -> Block:
    """The block of a layer."""
    return cast(Block, model.layers[layer])


@contextmanager
def mixer_stand_ins(model: HybridLM, stand_ins: Mapping[int, MixerStandIn | None]) -> Iterator[None]:
    """Let functions stand for the mixers of some layers inside the block.

    Args:
        model: the model.
        stand_ins: a function by layer; None: the mixer itself.
    """
    before = {layer: block_of(model, layer).mixer_stand_in for layer in stand_ins}
    try:
        for layer, function in stand_ins.items():
            block_of(model, layer).mixer_stand_in = function
        yield
    finally:
        for layer, function in before.items():
            block_of(model, layer).mixer_stand_in = function


def windowed_attention(model: HybridLM, layer: int, window: int, first_tokens: int) -> MixerStandIn:
    """Attention of a layer limited to a window and the first tokens, with the layer's own weights.

    Args:
        model: the model that has it.
        layer: index of the layer.
        window: keys that a token sees, its own included.
        first_tokens: keys at the start of its document that it sees besides.

    Raises:
        ConfigError: the layer's mixer has no such form.
    """
    config = model.config
    with torch.device("meta"):
        limited = build_mixer(config.mixers[config.layers()[layer]].with_window(window, first_tokens),
                              config.layer_context(layer))
    own = block_of(model, layer).mixer.state_dict(keep_vars=True)
    limited.load_state_dict({name: own[name] for name in limited.state_dict()}, assign=True)
    return lambda mixer, x_BTD, seq: limited(x_BTD, seq)


def without_linear_branch(mixer: SequenceMixer, x_BTD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Aux]:
    """Run a mixer without what it keeps in a state of fixed size; itself a stand-in."""
    return mixer.without_linear_branch(x_BTD, seq), {}
