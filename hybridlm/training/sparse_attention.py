"""Applies a stage's options of sparse attention to a built model: mode, top-k, weights of losses, recall."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hybridlm.config.schema import StageConfig
from hybridlm.model.config import ModelConfig
from hybridlm.model.edit import leave_dense
from hybridlm.model.mixers.contract import SequenceMixer
from hybridlm.model.model import HybridLM
from hybridlm.model.stand_ins import block_of
from hybridlm.training.stages import Stage

log = logging.getLogger("hybridlm")


def _mixers(model: nn.Module) -> list[SequenceMixer]:
    """List all mixers, branches of parallel ones too."""
    return [module for module in model.modules() if isinstance(module, SequenceMixer)]


def set_attention(model: HybridLM, stage: Stage) -> None:
    """Set attention mode, top-k and loss weights as the stage says; what it leaves open is as in the model's config."""
    model.loss_weights = dict(stage.loss_weights)
    for mixer in _mixers(model):
        mixer.set_attention(stage.attention_mode, stage.loss_weights)
        mixer.set_topk(stage.topk)
    for layer in stage.dense_layers:
        for mixer in _mixers(block_of(model, layer)):
            mixer.set_attention("dense", stage.loss_weights)


def freeze_idle_indexers(model: HybridLM) -> None:
    """Freeze selectors whose loss has no weight: they get no gradient, and must not be decayed either."""
    mixers = _mixers(model)
    for place, mixer in enumerate(mixers, 1):
        mixer.freeze_idle_parameters(mixers[place:])


def stage_model(config: ModelConfig, stage: Stage) -> ModelConfig:
    """Return the config of the model in this stage, for its checkpoints and its FLOPs; unused mixers stay."""
    changed = copy.deepcopy(config)
    for name in changed.used_mixers():
        mixer = changed.mixers[name]
        mixer = mixer if stage.attention_mode is None else mixer.with_attention_mode(stage.attention_mode)
        changed.mixers[name] = mixer if stage.topk is None else mixer.with_topk(stage.topk)
    return leave_dense(changed, stage.dense_layers)


def describe_attention(model: HybridLM, stage: Stage, asked: StageConfig, dense_below: int | None) -> None:
    """Log that a stage is dense because its sequences are short; warn of a top-k that leaves no key out.

    Args:
        model: as the stage has set it.
        stage: the stage.
        asked: its config.
        dense_below: of the recipe.
    """
    if stage.attention_mode != asked.attention_mode:
        log.info("stage %s: its sequences of %d tokens are shorter than recipe.dense_below=%s, so attention is dense",
                 stage.name, stage.sequence_length, dense_below)
    topk = max((keys for mixer in _mixers(model) if (keys := mixer.selected_keys()) is not None), default=0)
    if topk >= stage.sequence_length:
        log.warning("stage %s: top-k %d is not below the length of %d tokens, so every key is selected and attention "
                    "is dense; take longer sequences or a smaller recipe.stages.%d.topk", stage.name, topk,
                    stage.sequence_length, stage.index)


@contextmanager
def measuring_recall(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Let forwards report the loss of each selection and its recall against dense attention."""
    mixers = _mixers(model) if on else []
    for mixer in mixers:
        mixer.measure_selection(True)
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.measure_selection(False)
