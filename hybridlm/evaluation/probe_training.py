"""Training of a small model on a probe, and its scores at the length of training and at longer ones.

B examples, T tokens per example, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from hybridlm.errors import require
from hybridlm.evaluation.probes import Probe, Score, make_probe
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM, build_model
from hybridlm.optimizers import OPTIMIZERS, LRScheduleConfig, OptimizerSet, build_optimizer
from hybridlm.optimizers.lr_schedule import lr_factor

DEFAULT_LENGTH = 64  # tokens per example
SCHEDULE = LRScheduleConfig(kind="cosine", warmup=0.1, min_ratio=0.1)
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class ProbeResult:
    """Settings and outcome of one training on a probe.

    `accuracy` has the Score at each length; `loss` is the mean over the last tenth of the steps, None if it is not
    finite or there were no steps; `seconds` covers training and scoring.
    """

    probe: str
    parameters: dict[str, Any]
    length: int
    steps: int
    lr: float
    seed: int
    batch_size: int
    chance: float
    num_params: int
    loss: float | None
    skipped_steps: int  # gradients that were not finite
    seconds: float
    accuracy: dict[int, Score] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        accuracy = {str(length): {"token": score.token, "exact": score.exact, "tokens": score.tokens,
                                  "examples": score.examples} for length, score in self.accuracy.items()}
        return {**asdict(self), "accuracy": accuracy}


def train_on_probe(model_config: ModelConfig, probe: Probe | str, steps: int = 1000, lr: float = 1e-3, seed: int = 0, *,
                   length: int | None = None, eval_lengths: Sequence[int] | None = None, batch_size: int = 32,
                   examples: int = 256, device: str = "cpu", start: HybridLM | None = None,
                   on_step: Callable[[int, float], None] | None = None) -> ProbeResult:
    """Train a model of this architecture on `probe`, from scratch, and score it on examples it has not seen.

    The model gets the probe's vocabulary and no multi-token prediction. Two calls with the same arguments see the same
    examples and first weights, and so do two architectures, as far as their layers are the same.

    Args:
        model_config: the architecture.
        probe: made by `make_probe`, or a name for the probe with its default parameters.
        steps: of training.
        lr: peak learning rate of AdamW.
        seed: of the first weights and the examples.
        length: tokens per example in training; default 64, or the probe's least length if that is more.
        eval_lengths: lengths at which it is scored; default `length`, twice and four times that.
        batch_size: examples per step.
        examples: scored at each length.
        device: where the model runs.
        start: a model that is trained further instead, with the probe's vocabulary, such as one of
            `model_with_pretrained_weights`. `steps` may then be 0.
        on_step: called with each step's number, from 1 on, and its loss.

    Raises:
        ConfigError: a value out of range, or a length that the probe does not fit into.
    """
    name = probe if isinstance(probe, str) else probe.task
    probe = make_probe(probe) if isinstance(probe, str) else probe
    length, lengths = probe_lengths(probe, length, eval_lengths)
    for key, value in (("batch_size", batch_size), ("examples", examples), ("lr", lr),
                       *([("steps", steps)] if start is None or steps else [])):
        require(value > 0, key, "must be positive", got=value)
    require(seed >= 0, "seed", "must not be negative", got=seed)
    begun = time.perf_counter()
    config = model_for_probe(model_config, probe, max(length, *lengths))
    model = build_model(config, seed=seed, device=device) if start is None else start
    model.train()
    optimizers = build_optimizer(model, OPTIMIZERS.config_class("adamw")(lr=lr, schedule=SCHEDULE))
    losses, skipped = [], 0
    for step in range(steps):
        indices = range(step * batch_size, (step + 1) * batch_size)
        batch = probe.batch(length, indices, seed=seed).to(device)
        optimizers.set_lr(lr * lr_factor(SCHEDULE, step, steps))
        loss = model(batch.input_ids, targets=batch.targets[..., None])
        losses.append(float(loss.losses["lm"].detach()))
        skipped += not _step(model, optimizers, loss.loss)
        if on_step is not None:
            on_step(step + 1, losses[-1])
    last = losses[-math.ceil(steps / 10):]
    mean = sum(last) / len(last) if last else math.nan
    accuracy = {asked: score_on_probe(model, probe, asked, seed=seed, examples=examples, batch_size=batch_size)
                for asked in lengths}
    return ProbeResult(name, asdict(probe), length, steps, lr, seed, batch_size, probe.chance,
                       model.num_params(), mean if math.isfinite(mean) else None, skipped,
                       time.perf_counter() - begun, accuracy)


def probe_lengths(probe: Probe, length: int | None = None,
                  eval_lengths: Sequence[int] | None = None) -> tuple[int, tuple[int, ...]]:
    """Fill in the default length of training and lengths of scoring, and check that the probe fits into all.

    Raises:
        ConfigError: a length that the probe does not fit into.
    """
    length = max(DEFAULT_LENGTH, probe.min_length) if length is None else length
    lengths = (length, 2 * length, 4 * length) if eval_lengths is None else tuple(eval_lengths)
    for asked in (length, *lengths):
        probe.check_length(asked)
    return length, lengths


def _step(model: HybridLM, optimizers: OptimizerSet, loss: torch.Tensor) -> bool:
    """Compute the gradient and update; False if the gradient was not finite and nothing was changed."""
    optimizers.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizers.parameters(), MAX_GRAD_NORM)
    finite = bool(torch.isfinite(norm))
    if finite:
        optimizers.step()
    model.post_optimizer_step(update=finite)
    return finite


def model_for_probe(config: ModelConfig, probe: Probe, length: int) -> ModelConfig:
    """The architecture with the probe's vocabulary, room for `length` tokens and no multi-token prediction."""
    return replace(config, vocab_size=probe.vocab_size, mtp=replace(config.mtp, depth=0, mixer=None),
                   max_position=max(config.max_position, length), published=None)


@torch.no_grad()
def score_on_probe(model: HybridLM, probe: Probe, length: int, *, seed: int = 0, examples: int = 256,
                   batch_size: int = 32) -> Score:
    """Compare the likeliest token at every asked position with the answers, on examples of the test split."""
    was_training, score = model.training, Score()
    model.eval()
    try:
        for first in range(0, examples, batch_size):
            indices = range(first, min(first + batch_size, examples))
            batch = probe.batch(length, indices, seed=seed, split="test").to(model.device)
            score += Score.of(model(batch.input_ids).logits.argmax(-1), batch.targets)
    finally:
        model.train(was_training)
    return score
