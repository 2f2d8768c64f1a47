"""Probes on the weights of a checkpoint: its layers, and the embeddings of tokens drawn for the ids of the probe.

The model chooses among the probe's ids only, so chance is the same as for a model trained on the probe alone.
V vocabulary of the probe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError
from hybridlm.evaluation.probe_training import model_for_probe
from hybridlm.evaluation.probes import PROBES, Probe
from hybridlm.model.model import HybridLM, build_model


def model_with_pretrained_weights(model: HybridLM, probe: Probe, length: int, seed: int = 0) -> HybridLM:
    """Build a model with the weights of `model`, the probe's vocabulary and no multi-token prediction.

    Args:
        model: of a checkpoint.
        probe: the task it will be asked.
        length: tokens for which it needs room.
        seed: of the tokens that stand for the probe's ids.

    Raises:
        ConfigError: the probe has more ids than the model has tokens.
    """
    ids_V = draw_tokens(model, probe.vocab_size, seed)
    made = build_model(model_for_probe(model.config, probe, length), device=str(model.device))
    weights = model.state_dict()
    for name in ("embed.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][ids_V.to(weights[name].device)]
    made.load_state_dict({name: weights[name] for name in made.state_dict()})
    return made.eval()


def draw_tokens(model: HybridLM, count: int, seed: int) -> Tensor:
    """Draw `count` different tokens that stand for text, int64 [V]."""
    tokenizer: Tokenizer | None = getattr(model, "tokenizer", None)
    usable = torch.arange(model.config.vocab_size) if tokenizer is None else torch.tensor(
        [index for index, text in enumerate(tokenizer.token_bytes[:model.config.vocab_size]) if text])
    if count > len(usable):
        raise ConfigError("probe", f"has {count} ids, more than the checkpoint has tokens", got=len(usable),
                          hint="give it a smaller vocabulary, such as mqar:key_vocab=16,value_vocab=16")
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    return usable[order[:count]]


def check_zero_shot(probe: Probe) -> None:
    """Raise ConfigError for a task whose rule does not show in its examples."""
    if not probe.in_context:
        known = [name for name, (cls, _) in PROBES.items() if cls.in_context]
        raise ConfigError("--zero-shot", f"the rule of {probe.task} does not show in its examples",
                          expected=f"one of {', '.join(known)}", hint="--fine-tune trains the checkpoint on it")
