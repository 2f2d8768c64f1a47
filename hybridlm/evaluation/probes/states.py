"""Probes of state tracking: parity, composition of permutations, modular arithmetic; each step asks the state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, permutations
from math import factorial
from typing import ClassVar

import numpy as np

from hybridlm.errors import require
from hybridlm.evaluation.probes.base import FILL, IGNORE, Probe, register_probe, require_positive

OPERATORS = "+-*"


@dataclass(frozen=True, kw_only=True)
class Parity(Probe):
    """Parity of a stream of bits, after each of them (Grazzi et al. 2024, arXiv 2411.12537).

    A linear mixer needs negative eigenvalues of its transition for it; softmax attention of fixed depth does not
    generalise in length (Hahn 2020, arXiv 1906.06755).
    """

    task: ClassVar[str] = "parity"

    @property
    def vocab_size(self) -> int:
        return 2

    @property
    def answer_ids(self) -> range:
        return range(2)

    @property
    def min_length(self) -> int:
        return 1

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        bits_T = rng.integers(2, size=length)
        return bits_T, np.bitwise_xor.accumulate(bits_T)


@lru_cache
def composition(degree: int) -> np.ndarray:
    """[N, N] over the N = degree! permutations in lexicographic order: entry (p, q) is p after q."""
    elements = list(permutations(range(degree)))
    index = {element: i for i, element in enumerate(elements)}
    return np.array([[index[tuple(p[i] for i in q)] for q in elements] for p in elements])


@dataclass(frozen=True, kw_only=True)
class Permutations(Probe):
    """The word problem of the symmetric group (Merrill et al. 2024, "The Illusion of State", arXiv 2404.08819).

    Each token is a permutation of `degree` things; asked is the composition of all so far. S3 is solvable; S5 is not,
    and its word problem is complete for NC1: unless TC0 is all of NC1, out of reach of attention, and of linear mixers
    with diagonal transitions, at fixed depth.
    """

    task: ClassVar[str] = "permutations"
    degree: int = 5

    def __post_init__(self) -> None:
        require(2 <= self.degree <= 6, "degree", "is out of range", got=self.degree, expected="2 to 6")

    @property
    def vocab_size(self) -> int:
        return factorial(self.degree)

    @property
    def answer_ids(self) -> range:
        return range(self.vocab_size)

    @property
    def min_length(self) -> int:
        return 1

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        table_NN = composition(self.degree)
        steps_T = rng.integers(self.vocab_size, size=length)
        return steps_T, np.array(list(accumulate(steps_T, lambda state, step: table_NN[step, state])))


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(Probe):
    """Modular arithmetic without brackets (Deletang et al. 2023, arXiv 2207.02098).

        3 + 4 * 2 - 1      modulo 5, from left to right: asked is 3, 2, 4, 3, after each number

    The difficulty is `modulus`; `operators` are some of + - *. The paper asks for the last value alone.
    """

    task: ClassVar[str] = "modular_arithmetic"
    modulus: int = 5
    operators: str = "+-*"

    def __post_init__(self) -> None:
        require(self.modulus >= 2, "modulus", "must be at least 2", got=self.modulus)
        require_positive(self, "num_operators")
        require(set(self.operators) <= set(OPERATORS), "operators", "knows no such operator", got=self.operators,
                expected="some of + - *")

    @property
    def num_operators(self) -> int:
        return len(self.operators)

    @property
    def vocab_size(self) -> int:
        return 1 + self.modulus + len(self.operators)

    @property
    def answer_ids(self) -> range:
        return range(1, 1 + self.modulus)

    @property
    def min_length(self) -> int:
        return 1

    def make(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        ids_T, targets_T = np.full(length, FILL), np.full(length, IGNORE)
        start = (length + 1) % 2  # numbers stand at even distances from the end
        numbers = rng.integers(self.modulus, size=len(range(start, length, 2)))
        operators = rng.integers(len(self.operators), size=len(numbers) - 1)
        ids_T[start::2], ids_T[start + 1::2] = 1 + numbers, 1 + self.modulus + operators
        state = int(numbers[0])
        targets_T[start] = 1 + state
        for step, (operator, number) in enumerate(zip(operators, numbers[1:], strict=True), start=1):
            state = self._apply(self.operators[operator], state, int(number)) % self.modulus
            targets_T[start + 2 * step] = 1 + state
        return ids_T, targets_T

    @staticmethod
    def _apply(operator: str, a: int, b: int) -> int:
        return {"+": a + b, "-": a - b, "*": a * b}[operator]


register_probe("parity", Parity)
register_probe("s3", Permutations, degree=3)
register_probe("s5", Permutations, degree=5)
register_probe("modular_arithmetic", ModularArithmetic)
