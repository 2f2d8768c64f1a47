"""Sampling from a model, token by token. B rows, T prompt tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.model import HybridLM
from hybridlm.model.output import ModelState

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Sampling:
    """Settings by which a token is drawn from the model's distribution; the filters act in this order.

    Args:
        temperature: divides the logits; 0 chooses the likeliest token.
        top_k: only the k likeliest tokens; None: all.
        top_p: only the fewest tokens that together have this probability (Holtzman et al. 2020).
        min_p: only tokens of at least this share of the likeliest one's probability (Nguyen et al. 2024).

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", "must not be negative", got=self.temperature)
        require(self.top_k is None or self.top_k > 0, "top_k", "must be positive", got=self.top_k)
        require(0 < self.top_p <= 1, "top_p", "must be a probability", got=self.top_p, expected="above 0, at most 1")
        require(0 <= self.min_p <= 1, "min_p", "must be a probability", got=self.min_p, expected="from 0 to 1")


class Generation(Iterator[Tensor]):
    """New tokens of every row, int64 [B], one step after the other; see `generate`."""

    def __init__(self, tokens: Iterator[Tensor], ended: set[int]):
        self._tokens = tokens
        self._ended = ended

    def __next__(self) -> Tensor:
        return next(self._tokens)

    def end_row(self, row: int) -> None:
        """Compute no more tokens of a row, which repeats its last one from now on."""
        self._ended.add(row)

    def close(self) -> None:
        """End the generation and give the model its mode back."""
        self._tokens.close()  # type: ignore[attr-defined]


def generate(model: HybridLM, input_ids: Prompts, max_new_tokens: int = 128, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = None,
             eos: int | Collection[int] | None = None, vocab_size: int | None = None) -> Generation:
    """Yield the next token of every row, int64 [B], as soon as it is known.

    The prompt goes through the model at once, then each token alone with the decode state. A row that has met a token
    of `eos` repeats it and is not computed any more; the last row to do so ends the generation (`eos` itself is
    yielded).

    Args:
        model: the model, in evaluation mode.
        input_ids: prompt, [T] or [B, T], or B lists of ids. Lists of unlike lengths need a model whose mixers decode
            padded rows (`HybridLM.decodes_padded_rows`).
        max_new_tokens: tokens to generate per row, at most.
        temperature: of the distribution; 0 chooses the likeliest token.
        top_k: sample among the k likeliest tokens; None: all.
        top_p: sample among the fewest tokens that together have this probability (Holtzman et al. 2020).
        min_p: sample among tokens of at least this share of the likeliest one's probability.
        seed: of the sampling; None draws a fresh one. The caller's random state does not change.
        eos: id or ids that end a row.
        vocab_size: only ids below it are sampled: for a tokenizer smaller than the model's vocabulary.

    Returns:
        An iterator over the new tokens, int64 [B] each.

    Raises:
        ConfigError: an empty prompt, or a value out of range.
    """
    rows = _rows(input_ids)
    require(bool(rows) and all(len(row) for row in rows), "prompt", "holds no token",
            got=[len(row) for row in rows], expected="at least one token")
    require(max_new_tokens > 0, "max_new_tokens", "must be positive", got=max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    if len({len(row) for row in rows}) > 1:
        require(model.decodes_padded_rows, "prompt",
                "must have one length: a mixer of this model decodes no padded rows", got=[len(row) for row in rows],
                hint="generate groups of one length, as `complete` does")
    stops = {eos} if isinstance(eos, int) else set(eos or ())
    generator = torch.Generator(model.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    ended: set[int] = set()
    tokens = _generate_tokens(model, rows, max_new_tokens, sampling, generator, stops, vocab_size, ended)
    return Generation(tokens, ended)


def complete(model: HybridLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, batch_size: int = 16,
             ends: Callable[[int, int], bool] | None = None, eos: int, seed: int | None = None,
             sampling: Sampling | None = None, vocab_size: int | None = None) -> list[list[int]]:
    """Generate behind many prompts, several at a time, the longest first.

    Args:
        model: the model.
        prompts: ids of each prompt, of any lengths.
        max_new_tokens: tokens to generate per prompt, at most.
        batch_size: prompts at a time; fewer where only prompts of one length can be decoded together.
        ends: called with the index of a prompt and its newest token, in order; True ends that prompt.
        eos: id that ends a prompt.
        seed: of the sampling of each batch; None draws a fresh one.
        sampling: how tokens are drawn; None takes the likeliest.
        vocab_size: as in `generate`.

    Returns:
        The new ids of each prompt, the one that ended it included.
    """
    sampling = Sampling(temperature=0.0) if sampling is None else sampling
    written: list[list[int]] = [[] for _ in prompts]
    for batch in _batches(prompts, batch_size, model.decodes_padded_rows):
        generation = generate(model, [prompts[index] for index in batch], max_new_tokens, seed=seed, eos=eos,
                              vocab_size=vocab_size, temperature=sampling.temperature, top_k=sampling.top_k,
                              top_p=sampling.top_p, min_p=sampling.min_p)
        open_rows = dict(enumerate(batch))
        for token_B in generation:
            tokens = token_B.tolist()
            for row, index in list(open_rows.items()):
                written[index].append(tokens[row])
                if (ends is not None and ends(index, tokens[row])) or tokens[row] == eos:
                    del open_rows[row]
                    generation.end_row(row)
    return written


def _batches(prompts: Sequence[Sequence[int]], size: int, padded: bool) -> Iterator[list[int]]:
    """Indices of the prompts of each batch: neighbours by length, or of one length."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batch: list[int] = []
    for index in order:
        if len(batch) == size or (batch and not padded and len(prompts[index]) != len(prompts[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _rows(input_ids: Prompts) -> list[list[int]]:
    if isinstance(input_ids, Tensor):
        input_ids = input_ids.tolist()
    ids = list(input_ids)
    if not ids or not isinstance(ids[0], int):
        try:
            return [[int(token) for token in row] for row in ids]  # type: ignore[union-attr]
        except TypeError:  # numpy integers
            pass
    return [[int(token) for token in ids]]  # type: ignore[arg-type]


@torch.no_grad()
def _generate_tokens(model: HybridLM, rows: list[list[int]], max_new_tokens: int, sampling: Sampling,
                     generator: torch.Generator, stops: set[int], vocab_size: int | None,
                     ended: set[int]) -> Iterator[Tensor]:
    """The tokens; `ended` holds rows that end from outside."""
    was_training = model.training
    active = list(range(len(rows)))  # rows that are still computed, in the order of the decode state
    tokens = [row[-1] for row in rows]
    try:
        model.eval()
        state, logits_BV = _read_prompts(model, rows, max_new_tokens)
        for step in range(max_new_tokens):
            if step:
                if model.training:  # the caller has trained in between; `eval` visits every module
                    model.eval()
                ids_B1 = torch.tensor([[tokens[row]] for row in active], device=model.device)
                logits_BV = _next_logits(model, ids_B1, state)
            drawn = sample(logits_BV[:, :vocab_size], sampling, generator).tolist()
            for row, token in zip(active, drawn, strict=True):
                tokens[row] = token
            yield torch.tensor(tokens, device=model.device)
            kept = [place for place, row in enumerate(active) if tokens[row] not in stops and row not in ended]
            if not kept:
                return
            if len(kept) < len(active):
                active = [active[place] for place in kept]
                state.reorder(torch.tensor(kept))
    finally:
        model.train(was_training)


def _read_prompts(model: HybridLM, rows: list[list[int]], max_new_tokens: int) -> tuple[ModelState, Tensor]:
    """The decode state behind the prompts, and the logits [B, V] of their first new tokens."""
    groups: dict[int, list[int]] = {}
    for row, ids in enumerate(rows):
        groups.setdefault(len(ids), []).append(row)
    states, logits = [], []
    for length, members in groups.items():
        state = model.new_state(len(members), length + max_new_tokens)
        logits.append(_next_logits(model, torch.tensor([rows[row] for row in members], device=model.device), state))
        states.append(state)
    if len(groups) == 1:
        return states[0], logits[0]
    order = torch.tensor([row for members in groups.values() for row in members]).argsort()
    joined = ModelState.join(states, max_new_tokens)
    joined.reorder(order)
    return joined, torch.cat(logits)[order.to(model.device)]


def _next_logits(model: HybridLM, ids_BT: Tensor, state: ModelState) -> Tensor:
    logits = model(ids_BT, state=state, logits_to_keep=1).logits
    assert logits is not None
    return logits[:, -1]


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token per row, int64 [B].

    Args:
        logits_BV: logits of the next token.
        sampling: how tokens are drawn.
        generator: of the device of the logits.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    p_BV = torch.softmax(logits_BV, dim=-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of the likelier ones
        p_BV = torch.zeros_like(p_BV).scatter_(1, order_BV, sorted_BV.masked_fill(before_BV >= sampling.top_p, 0.0))
    if sampling.min_p > 0:
        p_BV = p_BV.masked_fill(p_BV < sampling.min_p * p_BV.amax(-1, keepdim=True), 0.0)
    return torch.multinomial(p_BV, 1, generator=generator)[:, 0]
