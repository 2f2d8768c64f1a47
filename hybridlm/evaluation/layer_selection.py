"""Chooses the attention layers of a model that stay when the others get another mixer, by what each is worth.

The loss on text hardly tells: most of it needs a window and the first token alone. Recall of repeated tokens does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from hybridlm import checkpoint as ckpt
from hybridlm.data.packing import Batch
from hybridlm.errors import ConfigError, require
from hybridlm.evaluation.evaluate import evaluation_data, run_config
from hybridlm.evaluation.perplexity import perplexity_by_position
from hybridlm.interop.linearization import SELECTION_KEY, attention_layers, default_keep, spread_evenly
from hybridlm.model.block import MixerStandIn
from hybridlm.model.model import HybridLM
from hybridlm.model.stand_ins import block_of, mixer_stand_ins, windowed_attention
from hybridlm.training.recall import RecallSamples, recall_nll, repeated_samples

log = logging.getLogger("hybridlm")
Method = Literal["window", "greedy", "swap", "uniform"]
METHODS: tuple[str, ...] = get_args(Method)
RECALL_TOKENS = 128  # random tokens of one copy
RECALL_ROWS = 2


@dataclass(frozen=True)
class Quality:
    """Loss on text in nats per token, and negative log-likelihood of the second copy of random tokens in nats."""

    loss: float
    repeat_nll: float

    def damage(self, teacher: Quality) -> float:
        """Sum both differences from the teacher, in nats."""
        return self.loss - teacher.loss + self.repeat_nll - teacher.repeat_nll


class LayerTrial:
    """Measures a model whose attention is replaced in some layers.

    Args:
        model: the teacher.
        batches: held-out text.
        length: tokens per row of it.
        samples: rows that ask for recall.
        replacements: what stands in each attention layer when that is not kept.
    """

    def __init__(self, model: HybridLM, batches: Sequence[Batch], length: int, samples: RecallSamples,
                 replacements: Mapping[int, MixerStandIn]):
        self.model = model
        self.batches = batches
        self.length = length
        self.samples = samples
        self.replacements = replacements

    def measure(self, replaced: Iterable[int]) -> Quality:
        """Measure with the attention of these layers replaced, that of all others as it is."""
        with torch.no_grad(), mixer_stand_ins(self.model, {layer: self.replacements[layer] for layer in replaced}):
            loss = perplexity_by_position(self.model, self.batches, self.length)["loss"]
            return Quality(loss, recall_nll(self.model, self.samples, self.model.device))

    def measure_kept(self, keep: Iterable[int]) -> Quality:
        """Measure with only these of the attention layers left."""
        kept = set(keep)
        return self.measure([layer for layer in self.replacements if layer not in kept])


def select_layers(teacher: str | Path, overrides: Sequence[str] = (), *, method: Method = "window",
                  keep: int | None = None, window: int = 64, first_tokens: int = 1, student: str | Path | None = None,
                  windows: int = 2, sequence_length: int = 512, device: str = "cpu",
                  config_dir: str | None = None) -> dict[str, Any]:
    """Choose the attention layers of a teacher that stay, and compare the choice with an even spread.

    Args:
        teacher: a checkpoint or run folder.
        overrides: `data.*` settings; by default the validation text of the teacher's run.
        method: `window` limits each layer alone to a window and keeps those that lose most; `swap` puts the mixer of
            `student` there; `greedy` begins with the first of `window` and takes out, one after the other, the layer
            that the rest misses least; `uniform` spreads evenly.
        keep: number of layers that stay; None: a quarter.
        window: tokens that a limited layer sees, the query's own included.
        first_tokens: tokens at the start of its document that it sees besides.
        student: a run of `recipe=linearize` that has converted every layer (`recipe.convert.keep=0`), for `swap`.
        windows: number of windows of text.
        sequence_length: tokens per window.
        device: where the model runs.
        config_dir: a folder with configs of your own.

    Returns:
        The layers under `keep`, what each is worth, and the teacher, the chosen, the even and the empty set measured.

    Raises:
        ConfigError, CheckpointError, DataError: something cannot be read, or does not fit.
    """
    require(method in METHODS, "method", "is unknown", got=method, expected=f"one of {', '.join(METHODS)}")
    for name, value in (("window", window), ("windows", windows), ("sequence_length", sequence_length - 1)):
        require(value >= 1, name, "is too small", got=value)
    folder = ckpt.resolve(teacher)
    model = ckpt.load_checkpoint(folder, device)
    attention = attention_layers(model.config)
    count = default_keep(attention) if keep is None else keep
    require(0 < count < len(attention), "keep", "is not a number of layers that leaves others to convert", got=count,
            expected=f"1 to {len(attention) - 1}")
    length = min(sequence_length, model.config.max_position)
    dataset, source = evaluation_data(run_config(folder, overrides, config_dir), overrides, length,
                                      ckpt.data_rules(folder))
    batches = [dataset.batch([index]) for index in range(min(windows, len(dataset)))]
    samples = repeated_samples(model.config.vocab_size, min(RECALL_TOKENS, model.config.max_position // 2),
                               rows=RECALL_ROWS)
    if method == "swap":
        replacements = _mixers_of(student, model, attention, device)
    else:
        replacements = {layer: windowed_attention(model, layer, window, first_tokens) for layer in attention}
    trial = LayerTrial(model, batches, length, samples, replacements)
    base = trial.measure([])
    uniform = spread_evenly(attention, count)
    alone = {} if method == "uniform" else {layer: trial.measure([layer]) for layer in attention}
    ranked = sorted(alone, key=lambda layer: -alone[layer].damage(base))
    chosen = {"uniform": lambda: uniform, "greedy": lambda: _eliminate(trial, ranked, count),
              "window": lambda: sorted(ranked[:count]), "swap": lambda: sorted(ranked[:count])}[method]()
    return {SELECTION_KEY: chosen, "method": method, "teacher": str(folder), "data": source,
            "tokens": sum(batch.num_tokens for batch in batches), "window": None if method == "swap" else window,
            "first_tokens": None if method == "swap" else first_tokens,
            "student": None if student is None else str(student),
            "layers": [{"layer": layer, **asdict(found), "damage": found.damage(base)}
                       for layer, found in alone.items()],
            "measured": {"teacher": asdict(base), "chosen": asdict(trial.measure_kept(chosen)),
                         "uniform": {"layers": uniform, **asdict(trial.measure_kept(uniform))},
                         "none kept": asdict(trial.measure_kept([]))}}


def _eliminate(trial: LayerTrial, ranked: Sequence[int], count: int) -> list[int]:
    """Take out of the first candidates, one after the other, the layer whose loss hurts least."""
    kept = list(ranked[: max(2 * count, count + 2)])
    while len(kept) > count:
        left = {layer: trial.measure_kept([other for other in kept if other != layer]) for layer in kept}
        kept.remove(min(kept, key=lambda layer: (left[layer].loss + left[layer].repeat_nll, layer)))
    return sorted(kept)


def _mixers_of(student: str | Path | None, teacher: HybridLM, attention: Sequence[int],
               device: str) -> dict[int, MixerStandIn]:
    """The converted mixers of a student, as stand-ins for the attention of the teacher."""
    if student is None:
        raise ConfigError("student", "is missing", expected="a run of recipe=linearize with recipe.convert.keep=0",
                          hint="--method swap puts its mixers into the teacher, one at a time")
    converted = ckpt.load_checkpoint(student, device)
    names, kinds = converted.config.layers(), teacher.config.layers()
    same_size = (len(names), converted.config.hidden_size) == (len(kinds), teacher.config.hidden_size)
    still = [layer for layer in attention if not same_size
             or converted.config.mixers[names[layer]] == teacher.config.mixers[kinds[layer]]]
    if still:
        raise ConfigError("student", "has not converted every attention layer of the teacher", got=str(student),
                          expected=f"another mixer in layers {still}", hint="train one with recipe.convert.keep=0")

    def stand_in(layer: int) -> MixerStandIn:
        mixer = block_of(converted, layer).mixer
        return lambda old, x_BTD, seq: mixer(x_BTD, seq)

    return {layer: stand_in(layer) for layer in attention}
