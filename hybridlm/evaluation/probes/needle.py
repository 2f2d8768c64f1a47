"""Probe of needles in a haystack: one, several keys, or several values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.evaluation.probes.base import (
    Probe,
    append_questions,
    place_blocks,
    register_probe,
    require_at_most,
    require_positive,
)

NEEDLE, QUERY, FIRST = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Needle(Probe):
    """Needle retrieval of RULER (Hsieh et al. 2024, arXiv 2404.06654), as tokens.

        x x NEEDLE k v x x x NEEDLE k' v' x ... QUERY k      the values of k are asked, in order of appearance

    Needles stand anywhere among random tokens of a vocabulary of their own. One key and one value is RULER's single
    needle, `num_keys` > 1 the multi-key form (the others distract), `num_values` > 1 the multi-value form. RULER
    takes the values in any order.
    """

    task: ClassVar[str] = "needle"
    in_context: ClassVar[bool] = True
    num_keys: int = 1
    num_values: int = 1
    key_vocab: int = 32
    value_vocab: int = 32
    noise_vocab: int = 32

    def __post_init__(self) -> None:
        require_positive(self, "num_keys", "num_values", "key_vocab", "value_vocab", "noise_vocab")
        require_at_most(self, "num_keys", self.key_vocab, "needs as many different keys")
        require_at_most(self, "num_values", self.value_vocab // self.num_keys, "needs different values in all needles")

    @property
    def vocab_size(self) -> int:
        return FIRST + self.key_vocab + self.value_vocab + self.noise_vocab

    @property
    def answer_ids(self) -> range:
        return range(FIRST + self.key_vocab, FIRST + self.key_vocab + self.value_vocab)

    @property
    def min_length(self) -> int:
        return 3 * self.num_keys * self.num_values + 1 + self.num_values

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        count = self.num_keys * self.num_values
        keys_K = FIRST + rng.choice(self.key_vocab, self.num_keys, replace=False)
        keys_N = rng.permutation(np.repeat(keys_K, self.num_values))
        values_N = self.answer_ids.start + rng.choice(self.value_vocab, count, replace=False)
        hay_T = self.answer_ids.stop + rng.integers(self.noise_vocab, size=length - 1 - self.num_values)
        head_T = place_blocks(rng, [(NEEDLE, k, v) for k, v in zip(keys_N, values_N, strict=True)], hay_T)
        return append_questions(head_T, [((QUERY, keys_K[0]), list(values_N[keys_N == keys_K[0]]))])


register_probe("needle_single", Needle)
register_probe("needle_multi_key", Needle, num_keys=8)
register_probe("needle_multi_value", Needle, num_keys=2, num_values=4)
