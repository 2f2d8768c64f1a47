"""Probe of multi-query associative recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.evaluation.probes.base import FILL, IGNORE, Probe, register_probe, require_at_most, require_positive


@dataclass(frozen=True, kw_only=True)
class MultiQueryRecall(Probe):
    """MQAR of Zoology (Arora et al. 2023, arXiv 2312.04927).

        k1 v1 k2 v2 ... kP vP . . k2 . k1 . . .      at a key that comes again, its value is asked

    Pairs stand first; each key comes again once, after a gap from the power law p(gap) ~ gap^(power - 1). A fixed
    state holds a limited number of pairs, attention any number: `num_pairs` is the difficulty. `num_queries` keys
    are asked (null: all).

    Zoology's generator differs. All positions without a pair or key hold one token without meaning here; it draws
    random tokens of the whole vocabulary, which may be keys or values. A key that comes again may stand at any
    position here, at every second one there. Values of different keys may be equal here; there all are different. It
    asks every key. `power` is 0.1 here, 0.01 there, and the vocabulary has 64 keys and 64 values, there 8,192 tokens,
    one half keys. It may show the pairs several times (`num_passes`); here they stand once.
    """

    task: ClassVar[str] = "mqar"
    in_context: ClassVar[bool] = True
    num_pairs: int = 8
    num_queries: int | None = None
    key_vocab: int = 64
    value_vocab: int = 64
    power: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "num_pairs", "key_vocab", "value_vocab", "queries")
        require_at_most(self, "num_pairs", self.key_vocab, "needs as many different keys")
        require_at_most(self, "queries", self.num_pairs, "asks each key once")

    @property
    def queries(self) -> int:
        return self.num_pairs if self.num_queries is None else self.num_queries

    @property
    def vocab_size(self) -> int:
        return 1 + self.key_vocab + self.value_vocab

    @property
    def answer_ids(self) -> range:
        return range(1 + self.key_vocab, self.vocab_size)

    @property
    def min_length(self) -> int:
        return 2 * self.num_pairs + self.queries

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        keys_P = 1 + rng.choice(self.key_vocab, self.num_pairs, replace=False)
        values_P = self.answer_ids.start + rng.integers(self.value_vocab, size=self.num_pairs)
        start = 2 * self.num_pairs
        ids_T, targets_T = np.full(length, FILL), np.full(length, IGNORE)
        ids_T[:start:2], ids_T[1:start:2] = keys_P, values_P
        weight = np.arange(1, length - start + 1) ** (self.power - 1)
        places_Q = start + rng.choice(length - start, self.queries, replace=False, p=weight / weight.sum())
        asked_Q = rng.choice(self.num_pairs, self.queries, replace=False)
        ids_T[places_Q], targets_T[places_Q] = keys_P[asked_Q], values_P[asked_Q]
        return ids_T, targets_T


register_probe("mqar", MultiQueryRecall)
