"""Loss on held-out text: always the same samples, so that two numbers can be compared."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

from torch import nn

from hybridlm.distributed.engine import Engine
from hybridlm.training.losses import TEACHER_GROUPS, language_model_loss, measure_global_batch
from hybridlm.training.metrics import bits_per_byte, perplexity

# Keys of the sums over a validation, beside those of other losses.
NATS = "nats"
TARGETS = "targets"
BYTES = "bytes"
TOKENS = "tokens"
# Groups of values that a validation reports; how experts are used is reported per step alone.
REPORTED_GROUPS = ("loss/", "dsa/", "stat/", *(f"{group}/" for group in TEACHER_GROUPS))


def validate(engine: Engine, micro_batches: Iterable[Any],
             uncounted: Iterable[Any] = (), *, model: nn.Module | None = None) -> dict[str, float | int | None]:
    """Compute the mean loss per token over the micro batches of all ranks, with its perplexity and bits per byte.

    The loss is that of the next token alone; other losses of the model are reported beside it, and with `measuring`
    what sparse attention selects. Where layers exchange with other ranks all must make equally many forwards.

    Args:
        engine: the engine that has prepared the model.
        micro_batches: those of this rank.
        uncounted: micro batches whose forwards are only made for the ranks that have more to compute.
        model: another model than the prepared one, which every rank has in full, in evaluation mode.

    Returns:
        `validation_loss` in nats per token, `validation_perplexity`, `validation_bits_per_byte`, `validation_tokens`
        that count, and `validation_NAME` for the other losses and statistics.
    """
    sums: Counter[str] = Counter({NATS: 0, TARGETS: 0, BYTES: 0, TOKENS: 0})
    with engine.evaluating() as prepared, engine.autocast():
        model = prepared if model is None else model
        for micro_batch, counts in chain(zip(micro_batches, repeat(True)), zip(uncounted, repeat(False))):
            size = measure_global_batch([micro_batch])
            values = language_model_loss(model, engine.move(micro_batch), size).values
            if not counts:
                continue
            sums.update({NATS: float(values.pop("loss/lm")) * size.targets[0], TARGETS: size.targets[0],
                         BYTES: micro_batch.num_bytes, TOKENS: size.tokens})
            sums.update({name: float(value) * size.tokens for name, value in values.items()
                         if name.startswith(REPORTED_GROUPS)})
    sums = functools.reduce(_add_counters, engine.gather(sums))
    nats = sums.pop(NATS, 0)
    targets, num_bytes, tokens = (sums.pop(name, 0) // engine.context_parallel_size
                                  for name in (TARGETS, BYTES, TOKENS))
    loss = nats / max(targets, 1)
    return {"validation_loss": loss, "validation_perplexity": perplexity(loss),
            "validation_bits_per_byte": bits_per_byte(nats, num_bytes), "validation_tokens": targets,
            **{f"validation_{name}": value / tokens for name, value in sums.items()}}


def _add_counters(a: Counter[str], b: Counter[str]) -> Counter[str]:
    """Add by name; the operator of Counter drops sums that are not positive."""
    a.update(b)
    return a
