"""Speed of decoding and size of the decode state by length of context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from hybridlm.errors import require
from hybridlm.model.cost import decode_state_bytes
from hybridlm.model.model import HybridLM

WARM_UP_TOKENS = 3  # decoded before the clock counts


@torch.no_grad()
def decode_speed(model: HybridLM, contexts: Sequence[int], tokens: int = 32, batch: int = 1) -> list[dict[str, Any]]:
    """Measure reading a context of random tokens at once, and decoding one token after the other behind it.

    Args:
        model: stays in the mode, training or evaluation, in which it is.
        contexts: tokens of each context.
        tokens: decoded behind each context; their median time counts.
        batch: sequences.

    Returns:
        One row per context: context, batch, tokens per second of both, and `state_bytes`, the decode state of one
        sequence after the context in the dtype of the weights.

    Raises:
        ConfigError: a number that is not positive.
    """
    for key, value in (("tokens", tokens), ("batch", batch), *(("contexts", context) for context in contexts)):
        require(value > 0, key, "must be positive", got=value)
    was_training = model.training
    rows = []
    model.eval()
    generator = torch.Generator().manual_seed(0)
    try:
        for index, context in enumerate(contexts):
            ids_BT = torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(model.device)
            if index == 0:
                _prefill(model, ids_BT, 0)  # the first call of all also allocates and compiles
            state, seconds = _prefill(model, ids_BT, WARM_UP_TOKENS + tokens)
            times = []
            for _ in range(WARM_UP_TOKENS + tokens):
                start = _now(model)
                model(ids_BT[:, -1:], state=state, logits_to_keep=1)
                times.append(_now(model) - start)
            element = model.embed.weight.element_size()
            rows.append({"context": context, "batch": batch, "prefill_tokens_per_second": batch * context / seconds,
                         "decode_tokens_per_second": batch / median(times[WARM_UP_TOKENS:]),
                         "state_bytes": decode_state_bytes(model.config, context, element)})
    finally:
        model.train(was_training)
    return rows


def _prefill(model: HybridLM, ids_BT: torch.Tensor, room: int) -> tuple[Any, float]:
    """Read the context into a state with room for more tokens; return the state and the seconds it took."""
    state = model.new_state(ids_BT.shape[0], ids_BT.shape[1] + room)
    start = _now(model)
    model(ids_BT, state=state, logits_to_keep=1)
    return state, _now(model) - start


def _now(model: HybridLM) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
