"""Probe of n-grams that are learned from the sequence itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.evaluation.probes.base import IGNORE, Probe, register_probe, require_positive


@dataclass(frozen=True, kw_only=True)
class InContextNGram(Probe):
    """A Markov chain that has to be learned from the sequence itself (Edelman et al. 2024, "The Evolution of
    Statistical Induction Heads", arXiv 2402.11004; Akyurek et al. 2024, arXiv 2401.12973).

    Every sequence draws its own chain: a favourite successor for each context of `n` - 1 tokens, taken with
    probability 1 - `noise`, else any token. Asked is the token that followed the present context in more than half
    of its earlier occurrences; where there is none, nothing is asked. The papers score probabilities; a majority has
    one right answer.
    """

    task: ClassVar[str] = "ngram"
    in_context: ClassVar[bool] = True
    n: int = 2
    alphabet: int = 16
    noise: float = 0.2

    def __post_init__(self) -> None:
        require(self.n >= 2, "n", "must be at least 2", got=self.n)
        require_positive(self, "alphabet")
        require(0 <= self.noise < 1, "noise", "must be a probability", got=self.noise, expected="at least 0, below 1")

    @property
    def vocab_size(self) -> int:
        return self.alphabet

    @property
    def answer_ids(self) -> range:
        return range(self.alphabet)

    @property
    def min_length(self) -> int:
        return 2 * self.alphabet ** (self.n - 1) + self.n  # each context can come twice

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        favourite: dict[tuple[int, ...], int] = {}
        followed: dict[tuple[int, ...], Counter[int]] = {}
        drawn_T, stray_T = rng.integers(self.alphabet, size=length), rng.random(length) < self.noise
        ids, targets_T = rng.integers(self.alphabet, size=self.n - 1).tolist(), np.full(length, IGNORE)
        for t in range(self.n - 2, length - 1):
            context = tuple(ids[t - self.n + 2:t + 1])
            targets_T[t] = majority(followed.setdefault(context, Counter()))
            if context not in favourite:
                favourite[context] = int(rng.integers(self.alphabet))
            token = int(drawn_T[t]) if stray_T[t] else favourite[context]
            followed[context][token] += 1
            ids.append(token)
        last = tuple(ids[length - self.n + 1:length])
        targets_T[-1] = majority(followed.get(last, Counter()))
        return np.array(ids), targets_T


def majority(counts: Counter[int]) -> int:
    """The token that makes up more than half of the counts, or -100."""
    if not counts:
        return IGNORE
    token, count = counts.most_common(1)[0]
    return token if 2 * count > counts.total() else IGNORE


register_probe("ngram", InContextNGram)
