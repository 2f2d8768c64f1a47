"""What a stage says of sparse attention, put into a built model: mode, top-k, weights of the losses, measuring."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hybridlm.model.config import ModelConfig
from hybridlm.model.mixers.common.indexed_attention import IndexedMixer
from hybridlm.model.model import HybridLM
from hybridlm.training.stages import Stage

log = logging.getLogger("hybridlm")
INDEXER_PARAMETERS = "*.indexer.*"  # the parameters of an indexer


def indexed_mixers(model: nn.Module) -> list[IndexedMixer]:
    """The mixers with an indexer, of their own or shared."""
    return [m for m in model.modules() if isinstance(m, IndexedMixer) and m.indexer_config is not None]


def set_attention(model: HybridLM, stage: Stage) -> None:
    """The model as the stage wants it; what the stage leaves open is as in the model's config."""
    model.loss_weights = dict(stage.loss_weights)
    for mixer in indexed_mixers(model):
        config = mixer.indexer_config
        assert config is not None
        mixer.attention_mode = stage.attention_mode or config.mode
        mixer.kl_weight = stage.loss_weights.get("indexer_kl", config.loss_weight)
        if mixer.indexer is not None:
            mixer.indexer.topk = stage.topk or config.topk


def freeze_idle_indexers(model: HybridLM) -> None:
    """Indexers whose loss has no weight get no gradient, and are not to be decayed either."""
    last: IndexedMixer | None = None
    learning: dict[IndexedMixer, bool] = {}
    for mixer in indexed_mixers(model):
        last = mixer if mixer.indexer is not None else last
        if last is not None:
            learning[last] = learning.get(last, False) or mixer.kl_weight > 0
    for mixer, learns in learning.items():
        if not learns and mixer.indexer is not None:
            mixer.indexer.requires_grad_(False)


def stage_model(config: ModelConfig, stage: Stage) -> ModelConfig:
    """The config of the model in this stage: what its checkpoints say of themselves, and what its FLOPs follow."""
    changed = copy.deepcopy(config)
    for mixer in changed.mixers.values():
        indexer = getattr(mixer, "indexer", None)
        if indexer is not None:
            indexer.mode = stage.attention_mode or indexer.mode
            indexer.topk = stage.topk or indexer.topk
    return changed


def warn_of_selection(model: HybridLM, stage: Stage) -> None:
    """A top-k that leaves nothing out is allowed, and worth a line."""
    topk = max((m.indexer.topk for m in indexed_mixers(model) if m.indexer is not None), default=0)
    sparse = any(m.attention_mode == "sparse" for m in indexed_mixers(model))
    if sparse and topk >= stage.sequence_length:
        log.warning("stage %s: top-k %d is not below the length of %d tokens, so every key is selected and attention "
                    "is dense; take longer sequences or a smaller recipe.stages.%d.topk", stage.name, topk,
                    stage.sequence_length, stage.index)


@contextmanager
def measuring_recall(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within it, evaluation reports the loss of each indexer and its recall against the dense attention."""
    mixers = indexed_mixers(model) if on else []
    for mixer in mixers:
        mixer.measuring = True
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.measuring = False
