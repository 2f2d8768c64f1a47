"""Loss on held-out text: always the same samples, so that two numbers can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hybridlm.distributed.engine import Engine
from hybridlm.training.metrics import bits_per_byte, perplexity
from hybridlm.training.objective import language_model, whole_batch


def validate(engine: Engine, parts: Iterable[Any]) -> dict[str, float | int | None]:
    """Mean loss a token over `parts`, with its perplexity and bits a byte.

    The loss is that of the next token alone; what else the model was trained on is reported beside it, and with
    `measuring` what sparse attention selects.
    """
    nats = other_tokens = 0.0
    tokens = num_bytes = 0
    others: dict[str, float] = {}
    with engine.evaluating() as model:
        for part in parts:
            whole = whole_batch([part])
            values = language_model(whole)(model, engine.move(part)).values
            nats += float(values.pop("loss/lm")) * whole.targets[0]
            tokens += whole.targets[0]
            num_bytes += part.num_bytes
            other_tokens += whole.tokens
            for name in [name for name in values if name.startswith(("loss/", "dsa/"))]:
                others[name] = others.get(name, 0.0) + float(values[name]) * whole.tokens
    loss = nats / max(tokens, 1)
    return {"validation_loss": loss, "validation_perplexity": perplexity(loss),
            "validation_bits_per_byte": bits_per_byte(nats, num_bytes), "validation_tokens": tokens,
            **{f"validation_{name}": value / other_tokens for name, value in others.items()}}
