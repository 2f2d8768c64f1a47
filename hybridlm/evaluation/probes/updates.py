"""Probe of key-value updates, of which the latest counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.evaluation.probes.base import (
    FILL,
    Probe,
    append_questions,
    place_blocks,
    register_probe,
    require_at_most,
    require_positive,
)

QUERY, FIRST = 1, 2


@dataclass(frozen=True, kw_only=True)
class KeyValueUpdates(Probe):
    """Keys that are written again and again (Schlag et al. 2021, arXiv 2102.11174: keys with replacement).

        k1 v1 . k2 v2 k1 v3 . . k1 v4 QUERY k2 QUERY k1      v2 and v4 are asked

    `num_writes` writes go to `num_keys` keys, each written at least once; a write always changes the value. A sum of
    outer products keeps old values beside the new one; the delta rule takes the old one out.
    """

    task: ClassVar[str] = "key_value_updates"
    in_context: ClassVar[bool] = True
    num_keys: int = 4
    num_writes: int = 16
    key_vocab: int = 32
    value_vocab: int = 32

    def __post_init__(self) -> None:
        require_positive(self, "num_keys", "key_vocab")
        require_at_most(self, "num_keys", min(self.key_vocab, self.num_writes),
                        "needs as many different keys and writes")
        require(self.value_vocab >= 2, "value_vocab", "must be at least 2", got=self.value_vocab)

    @property
    def vocab_size(self) -> int:
        return FIRST + self.key_vocab + self.value_vocab

    @property
    def answer_ids(self) -> range:
        return range(FIRST + self.key_vocab, self.vocab_size)

    @property
    def min_length(self) -> int:
        return 2 * self.num_writes + 2 * self.num_keys

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        keys_K = FIRST + rng.choice(self.key_vocab, self.num_keys, replace=False)
        again = rng.choice(keys_K, self.num_writes - self.num_keys)
        latest: dict[int, int] = {}
        writes = []
        for key in rng.permutation(np.concatenate([keys_K, again])).tolist():
            if key in latest:
                latest[key] = (latest[key] + int(rng.integers(1, self.value_vocab))) % self.value_vocab
            else:
                latest[key] = int(rng.integers(self.value_vocab))
            writes.append((key, self.answer_ids.start + latest[key]))
        head_T = place_blocks(rng, writes, np.full(length - 2 * self.num_keys, FILL))
        questions = [((QUERY, key), [self.answer_ids.start + latest[key]]) for key in rng.permutation(keys_K).tolist()]
        return append_questions(head_T, questions)


register_probe("key_value_updates", KeyValueUpdates)
