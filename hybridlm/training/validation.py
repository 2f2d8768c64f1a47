"""Loss on held-out text: always the same samples, so that two numbers can be compared."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

from hybridlm.distributed.engine import Engine
from hybridlm.training.metrics import bits_per_byte, perplexity
from hybridlm.training.objective import global_batch, language_model

NATS, TARGETS, BYTES, TOKENS = "nats", "targets", "bytes", "tokens"  # what is summed beside the other losses


def validate(engine: Engine, parts: Iterable[Any], uncounted: Iterable[Any] = ()) -> dict[str, float | int | None]:
    """Mean loss a token over the `parts` of all ranks, with its perplexity and bits a byte.

    The loss is that of the next token alone; what else the model was trained on is reported beside it, and with
    `measuring` what sparse attention selects. Where layers exchange with other ranks all must make equally many
    forwards: a rank with fewer parts makes the rest of them on `uncounted` ones.
    """
    sums: Counter[str] = Counter({NATS: 0, TARGETS: 0, BYTES: 0, TOKENS: 0})
    with engine.evaluating() as model:
        for part, counts in chain(zip(parts, repeat(True)), zip(uncounted, repeat(False))):
            whole = global_batch([part])
            values = language_model(whole)(model, engine.move(part)).values
            if not counts:
                continue
            sums.update({NATS: float(values.pop("loss/lm")) * whole.targets[0], TARGETS: whole.targets[0],
                         BYTES: part.num_bytes, TOKENS: whole.tokens})
            sums.update({name: float(value) * whole.tokens for name, value in values.items()
                         if name.startswith(("loss/", "dsa/"))})
    sums = functools.reduce(_added, engine.gather(sums))
    nats = sums.pop(NATS, 0)
    targets, num_bytes, tokens = (sums.pop(name, 0) // engine.context_parallel_size
                                  for name in (TARGETS, BYTES, TOKENS))
    loss = nats / max(targets, 1)
    return {"validation_loss": loss, "validation_perplexity": perplexity(loss),
            "validation_bits_per_byte": bits_per_byte(nats, num_bytes), "validation_tokens": targets,
            **{f"validation_{name}": value / tokens for name, value in sums.items()}}


def _added(a: Counter[str], b: Counter[str]) -> Counter[str]:
    """The sum, name by name; Counter's own drops what is not positive."""
    a.update(b)
    return a
