"""Probes of copying: a string, or the tokens of it that matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridlm.evaluation.probes.base import (
    FILL,
    Probe,
    append_questions,
    place_blocks,
    register_probe,
    require_positive,
)

COPY, FIRST = 1, 2


@dataclass(frozen=True, kw_only=True)
class Copy(Probe):
    """Copying a string of random tokens (Jelassi et al. 2024, "Repeat After Me", arXiv 2402.01032).

        a b c d COPY a b c      a b c d is asked, from COPY on

    The string is half the length, so length is the difficulty: a fixed state holds a limited string.
    """

    task: ClassVar[str] = "copy"
    in_context: ClassVar[bool] = True
    alphabet: int = 32

    def __post_init__(self) -> None:
        require_positive(self, "alphabet")

    @property
    def vocab_size(self) -> int:
        return FIRST + self.alphabet

    @property
    def answer_ids(self) -> range:
        return range(FIRST, self.vocab_size)

    @property
    def min_length(self) -> int:
        return 2

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        string = FIRST + rng.integers(self.alphabet, size=length // 2)
        head = np.concatenate([np.full(length % 2, FILL), string])
        return append_questions(head, [((COPY,), list(string))])


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Probe):
    """Selective copying (Jing et al. 2019, arXiv 1706.02761; Gu and Dao 2023, Mamba, arXiv 2312.00752).

        . a . . b . c . COPY a b      a b c is asked, from COPY on

    `num_tokens` tokens stand anywhere among blanks: what to keep depends on the content, not on the place.

    In the papers the model gets a marker at every position of the answer. Here it is teacher-forced, as a language
    model is in training: it reads the earlier tokens of the right answer, so one error does not lead to others. The
    length is chosen freely, and blanks fill the rest; Mamba trains on 4,096 positions with 16 tokens of 16 kinds.
    """

    task: ClassVar[str] = "selective_copy"
    num_tokens: int = 16
    alphabet: int = 16

    def __post_init__(self) -> None:
        require_positive(self, "num_tokens", "alphabet")

    @property
    def vocab_size(self) -> int:
        return FIRST + self.alphabet

    @property
    def answer_ids(self) -> range:
        return range(FIRST, self.vocab_size)

    @property
    def min_length(self) -> int:
        return 2 * self.num_tokens

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        string = FIRST + rng.integers(self.alphabet, size=self.num_tokens)
        head_T = place_blocks(rng, [(token,) for token in string], np.full(length - self.num_tokens, FILL))
        return append_questions(head_T, [((COPY,), list(string))])


register_probe("copy", Copy)
register_probe("selective_copy", SelectiveCopy)
