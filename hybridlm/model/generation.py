"""Sampling from a model, token by token. B rows, T prompt tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.model import HybridLM


def generate(model: HybridLM, input_ids: Tensor | Sequence[int], max_new_tokens: int = 128, *,
             temperature: float = 1.0, top_p: float = 1.0, seed: int | None = None,
             eos: int | Collection[int] | None = None, vocab_size: int | None = None) -> Iterator[Tensor]:
    """Yield the next token of every row, int64 [B], as soon as it is known.

    The prompt goes through the model at once, then each token alone with the decode state. A row that has met a token
    of `eos` repeats it; the last row to do so ends the generation (`eos` itself is yielded).

    Args:
        model: the model, in evaluation mode.
        input_ids: prompt, [T] or [B, T]; all rows of one length.
        max_new_tokens: tokens to generate per row, at most.
        temperature: of the distribution; 0 chooses the likeliest token.
        top_p: sample among the fewest tokens that together have this probability (Holtzman et al. 2020).
        seed: of the sampling; None draws a fresh one. The caller's random state does not change.
        eos: id or ids that end a row.
        vocab_size: only ids below it are sampled: for a tokenizer smaller than the model's vocabulary.

    Returns:
        An iterator over the new tokens, int64 [B] each.

    Raises:
        ConfigError: an empty prompt, or a value out of range.
    """
    prompt_BT = torch.as_tensor(input_ids, dtype=torch.int64, device=model.device)
    prompt_BT = prompt_BT[None] if prompt_BT.dim() == 1 else prompt_BT
    require(prompt_BT.dim() == 2 and 0 not in prompt_BT.shape, "prompt", "holds no token",
            got=list(prompt_BT.shape), expected="at least one token")
    require(max_new_tokens > 0, "max_new_tokens", "must be positive", got=max_new_tokens)
    require(temperature >= 0, "temperature", "must not be negative", got=temperature)
    require(0 < top_p <= 1, "top_p", "must be a probability", got=top_p, expected="above 0, at most 1")
    stops = {eos} if isinstance(eos, int) else set(eos or ())
    ends = torch.tensor(sorted(stops), dtype=torch.int64, device=model.device)
    generator = torch.Generator(model.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return _generate_tokens(model, prompt_BT, max_new_tokens, temperature, top_p, generator, ends, vocab_size)


@torch.no_grad()
def _generate_tokens(model: HybridLM, prompt_BT: Tensor, max_new_tokens: int, temperature: float, top_p: float,
           generator: torch.Generator, ends: Tensor, vocab_size: int | None) -> Iterator[Tensor]:
    was_training = model.training
    state = model.new_state(prompt_BT.shape[0], prompt_BT.shape[1] + max_new_tokens)
    step_BT = prompt_BT
    done_B = torch.zeros_like(prompt_BT[:, 0], dtype=torch.bool)
    token_B = prompt_BT[:, -1]
    try:
        for _ in range(max_new_tokens):
            model.eval()
            logits = model(step_BT, state=state, logits_to_keep=1).logits
            token_B = torch.where(done_B, token_B, sample(logits[:, -1, :vocab_size], temperature, top_p, generator))
            yield token_B
            done_B = done_B | torch.isin(token_B, ends)
            if bool(done_B.all()):
                return
            step_BT = token_B[:, None]
    finally:
        model.train(was_training)


def sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one token per row, int64 [B].

    Args:
        logits_BV: logits of the next token.
        temperature: 0 takes the likeliest token.
        top_p: sample among the fewest tokens that together have this probability.
        generator: of the device of the logits.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    p_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    if top_p < 1:
        sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of the likelier ones
        p_BV = torch.zeros_like(p_BV).scatter_(1, order_BV, sorted_BV.masked_fill(before_BV >= top_p, 0.0))
    return torch.multinomial(p_BV, 1, generator=generator)[:, 0]
